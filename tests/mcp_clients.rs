//! Clients of other makers at the MCP door, as `make test-mcp` installs them: the conformance suite, the Python and
//! TypeScript clients, the inspector's command line, codex.

use std::path::PathBuf;
use std::process::{Output, Stdio};

use exec_gateway::tools::Tool;
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};

use crate::support::{Marker, Workbench, codex};

fn clients() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/support/mcp_clients")
}

/// A program of the clients' directory, before all others of its name on this machine.
fn program(name: &str) -> Command {
    let bin = clients().join("node_modules/.bin");
    assert!(bin.exists(), "the clients are not installed: run `make test-mcp`, which installs them");
    let path = std::env::var("PATH").unwrap_or_default();
    let mut command = Command::new(bin.join(name));
    command.env("PATH", format!("{}:{path}", bin.display())).kill_on_drop(true);
    command
}

fn shown(output: &Output) -> String {
    format!("{}\n{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

/// Stands before the gateway with the token; gives its URL.
async fn with_bearer(bench: &Workbench) -> (Child, String) {
    let mut command = program("node");
    command.arg(clients().join("bearer.mjs"));
    command.args([&bench.gateway.address().to_string(), bench.caller.token.as_deref().unwrap()]);
    let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let url = lines.next_line().await.unwrap().expect("it tells its URL");
    (child, url)
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs clients that `make test-mcp` installs"]
async fn the_conformance_suite_passes_but_for_what_the_baseline_excuses() {
    let bench = Workbench::with(|config| config.mcp.progress_secs = 1).await;
    let (_proxy, url) = with_bearer(&bench).await;
    let baseline = clients().join("conformance.yml");

    let mut command = program("conformance");
    command.args(["server", "--url", &url, "--suite", "all", "--expected-failures"]).arg(baseline);
    let output = command.output().await.unwrap();

    println!("{}", shown(&output));
    assert!(output.status.success());
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs clients that `make test-mcp` installs"]
async fn the_python_client_lists_calls_and_gives_up() {
    let bench = Workbench::start().await;
    let marker = Marker::new();
    let url = format!("{}/mcp", bench.gateway.url());

    let mut command = Command::new(clients().join("venv/bin/python"));
    command.arg(clients().join("client.py")).args([&url, bench.caller.token.as_deref().unwrap(), &marker.to_string()]);
    let output = command.kill_on_drop(true).output().await.unwrap();

    assert!(output.status.success(), "{}", shown(&output));
    let came: Value = serde_json::from_slice(&output.stdout).unwrap();
    println!("{came}");
    let tools: Vec<_> = Tool::ALL.iter().map(|tool| tool.name()).collect();
    let session = &came["session"];
    assert_eq!((&session["tools"], &session["stdout"]), (&json!(tools), &json!("here\n")));
    assert!(!session["progress"].as_array().unwrap().is_empty(), "{came}");
    assert_eq!(
        (&session["missing"], &session["wrong"]),
        (&json!([true, "not_found"]), &json!([true, "bad_arguments"]))
    );
    assert_eq!((&session["given_up"], &session["environments"]), (&json!(true), &json!(["box"])));
    assert_eq!(came["client"], json!({ "tools": tools, "stdout": "newer\n" }));
    marker.is_on(0).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs clients that `make test-mcp` installs"]
async fn the_typescript_client_finds_answers_and_failures_as_their_schemas_say() {
    let bench = Workbench::start().await;
    let url = format!("{}/mcp", bench.gateway.url());

    let mut command = program("node");
    command.arg(clients().join("client.mjs")).args([&url, bench.caller.token.as_deref().unwrap()]);
    let output = command.output().await.unwrap();

    assert!(output.status.success(), "{}", shown(&output));
    let came: Value = serde_json::from_slice(&output.stdout).unwrap();
    let codes = ["not_found", "session_not_found"];
    let expected =
        json!({ "tools": Tool::ALL.len(), "stdout": "checked\n", "late": true, "codes": codes, "said": "said\n" });
    assert_eq!(came, expected);
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs clients that `make test-mcp` installs"]
async fn the_inspector_lists_and_calls_and_finds_no_fault_in_the_schemas() {
    let bench = Workbench::start().await;
    let url = format!("{}/mcp", bench.gateway.url());
    let header = format!("Authorization: Bearer {}", bench.caller.token.as_deref().unwrap());
    let inspect = async |arguments: &[&str]| {
        let mut command = program("mcp-inspector");
        command.args(["--cli", &url, "--transport", "http", "--header", &header]).args(arguments);
        let output = command.output().await.unwrap();
        assert!(output.status.success(), "{}", shown(&output));
        serde_json::from_slice::<Value>(&output.stdout).unwrap_or_else(|_| panic!("{}", shown(&output)))
    };

    let listed = inspect(&["--method", "tools/list", "--strict"]).await;
    assert_eq!(listed["tools"].as_array().unwrap().len(), Tool::ALL.len());
    let call = ["--method", "tools/call", "--tool-name", "shell", "--tool-arg", "command=echo inspected"];
    let called = inspect(&call).await;
    assert_eq!(called["structuredContent"]["stdout"], "inspected\n", "{called}");
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "its lines are those of the README, checked with the clients"]
async fn codex_takes_the_configuration_of_the_readme() {
    let home = crate::support::Scratch::new();
    let readme = include_str!("../README.md");
    let line = readme.lines().find(|line| line.starts_with("codex mcp add ")).expect("the README shows how");
    let arguments: Vec<_> = line.split(' ').skip(1).collect();

    let added = codex::process(home.path(), &arguments).output().await.unwrap();

    assert!(added.status.success(), "{}", shown(&added));
    let written = std::fs::read_to_string(home.path().join("config.toml")).unwrap();
    let lines = readme.split("```toml\n[mcp_servers").nth(1).and_then(|rest| rest.split("```").next()).unwrap();
    assert_eq!(written.trim(), format!("[mcp_servers{lines}").trim());
}
