//! The stock harness on the stock executor, over each of its three ways to the gateway, while nothing happens, the
//! gateway is killed or stopped, or its own or the executor's socket is cut.

use std::path::PathBuf;

use crate::endure::Rig;
use crate::support::{AppServer, Model, Proxy, Route, eventually};

/// Prints a line, then waits for a file called `go`; not for ever, should its test be gone.
const WAITING: &str =
    "echo ran >> runs; echo first; touch started; for i in $(seq 3000); do [ -e go ] && break; sleep 0.02; done; ";

/// A harness in the middle of a turn whose command has printed its first line and waits.
struct Turn {
    rig: Rig,
    /// The harness's own way to the gateway.
    line: Proxy,
    harness: AppServer,
    model: Model,
    work: PathBuf,
}

impl Turn {
    async fn begin(route: Route) -> Self {
        let rig = match route {
            Route::File | Route::Url => Rig::start().await,
            // It gives up for good when a closed port refuses it the way to its executor.
            Route::Registry => Rig::on_held_socket().await,
        };
        let work = rig.file("work");
        std::fs::create_dir(&work).unwrap();
        std::fs::write(work.join("note"), "written before\n").unwrap();
        let model = Model::ordering(&[&format!("{WAITING} cat note"), "cat runs note | wc -l"]).await;
        let token = rig.caller.token.as_deref().unwrap();
        let line = Proxy::holding(rig.address).await;
        let mut harness = AppServer::connected(route, line.address, &rig.credentials, token, &model).await;
        harness.begin_turn(&work).await;
        harness.hears_of_the_command().await;
        eventually("the command runs", async || work.join("started").exists().then_some(())).await;
        Self { rig, line, harness, model, work }
    }

    /// Lets the command end: it ran once, and the model was told all that it printed.
    async fn ends_well(mut self) {
        std::fs::write(self.work.join("go"), "").unwrap();
        self.harness.end_turn().await;
        let told = self.model.told();
        let [first, second] = &told[..] else { panic!("{told:?}") };
        assert!(first.contains("exited with code 0") && first.ends_with("Output:\nfirst\nwritten before\n"), "{first}");
        assert!(second.ends_with("Output:\n2\n"), "the command ran once: {second}");
    }
}

async fn runs_a_turn(route: Route) {
    Turn::begin(route).await.ends_well().await;
}

async fn outlives_a_killed_gateway(route: Route) {
    let mut turn = Turn::begin(route).await;
    turn.rig.kill_and_restart().await;
    turn.ends_well().await;
}

async fn outlives_a_stopped_gateway(route: Route) {
    let mut turn = Turn::begin(route).await;
    turn.rig.stop_and_restart().await;
    turn.ends_well().await;
}

async fn outlives_a_cut_of_its_own(route: Route) {
    let turn = Turn::begin(route).await;
    turn.line.cut();
    turn.ends_well().await;
}

async fn outlives_a_cut_executor(route: Route) {
    let turn = Turn::begin(route).await;
    turn.rig.proxy.cut();
    turn.ends_well().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_harness_of_an_environments_file_runs_a_turn() {
    runs_a_turn(Route::File).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_harness_of_an_environments_file_goes_on_after_its_gateway_was_killed() {
    outlives_a_killed_gateway(Route::File).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_harness_of_an_environments_file_goes_on_after_its_gateway_was_stopped() {
    outlives_a_stopped_gateway(Route::File).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_harness_of_an_environments_file_goes_on_after_it_was_cut_off_itself() {
    outlives_a_cut_of_its_own(Route::File).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_harness_of_an_environments_file_goes_on_after_its_executor_was_cut_off() {
    outlives_a_cut_executor(Route::File).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_harness_of_a_url_runs_a_turn() {
    runs_a_turn(Route::Url).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_harness_of_a_url_goes_on_after_its_gateway_was_killed() {
    outlives_a_killed_gateway(Route::Url).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_harness_of_a_url_goes_on_after_its_gateway_was_stopped() {
    outlives_a_stopped_gateway(Route::Url).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_harness_of_a_url_goes_on_after_it_was_cut_off_itself() {
    outlives_a_cut_of_its_own(Route::Url).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_harness_of_a_url_goes_on_after_its_executor_was_cut_off() {
    outlives_a_cut_executor(Route::Url).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_encrypted_harness_runs_a_turn() {
    runs_a_turn(Route::Registry).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_encrypted_harness_goes_on_after_its_gateway_was_killed() {
    outlives_a_killed_gateway(Route::Registry).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_encrypted_harness_goes_on_after_its_gateway_was_stopped() {
    outlives_a_stopped_gateway(Route::Registry).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_encrypted_harness_goes_on_after_it_was_cut_off_itself() {
    outlives_a_cut_of_its_own(Route::Registry).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_encrypted_harness_goes_on_after_its_executor_was_cut_off() {
    outlives_a_cut_executor(Route::Registry).await;
}
