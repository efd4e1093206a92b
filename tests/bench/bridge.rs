//! One harness, the same work over several ways: (1) straight to `codex exec-server --listen`, (2) the same behind a plain
//! proxy, (3) as the end of the encryption on a real executor's own link, (4) through the gateway over such a link, (5) as
//! the end of a link without encryption, and (6) through the gateway over such a link. The proxy is nginx where it is
//! installed, else a process that copies bytes between two TCP connections, which does less.
//!
//! Compare rows of one run alone: on a machine whose processors sleep while they wait, each wake costs several times
//! what it costs on one that something keeps awake.
#![allow(missing_docs, clippy::unwrap_used)]

#[allow(dead_code, reason = "each bench uses a part")]
mod own_end;
#[allow(dead_code, reason = "each bench uses a part")]
mod rig;
#[allow(unused_imports, reason = "each bench uses a part")]
#[path = "../support/mod.rs"]
mod support;

use std::net::SocketAddr;
use std::process::Stdio;

use serde_json::json;
use support::gateway::workspace;
use support::harness::Tongue;
use support::{CodexExecutor, DaemonProcess, Harness, MIB, Scratch};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::process::{Child, Command};

/// The argument with which the bench is its own proxy.
const PROXY: &str = "proxy-to";

const ROUNDS: usize = 9;
const REQUESTS: usize = 300;
const PRINTS: usize = 3;

/// What a harness has in common on all ways.
struct Way {
    name: &'static str,
    harness: Harness,
    prints: usize,
    p50: Vec<f64>,
    requests: Vec<f64>,
    rates: Vec<f64>,
}

impl Way {
    async fn new(name: &'static str, mut harness: Harness) -> Self {
        harness.initialize(None).await.unwrap();
        Self { name, harness, prints: 0, p50: Vec::new(), requests: Vec::new(), rates: Vec::new() }
    }

    /// `(1)`, by which the summary calls it.
    fn number(&self) -> &str {
        self.name.split(' ').next().unwrap_or_default()
    }

    async fn ask(&mut self) {
        let mut round = Vec::with_capacity(REQUESTS);
        for _ in 0..REQUESTS {
            round.push(
                rig::seconds(async {
                    self.harness.call("environment/status", json!({})).await.unwrap();
                })
                .await,
            );
        }
        self.p50.push(rig::median(&round));
        self.requests.extend(round);
    }

    /// One process that prints so many MiB.
    async fn print(&mut self, mebibytes: usize) {
        self.prints += 1;
        let process = format!("p{}", self.prints);
        let seconds = rig::seconds(async {
            let command = format!("head -c {} /dev/zero | tr '\\0' x", mebibytes * MIB);
            self.harness.start(&process, &command).await;
            // Not parsed: the client should not be what limits any of the ways.
            while !contains(&self.harness.hear_bytes().await.unwrap(), b"process/closed") {}
        });
        let seconds = seconds.await;
        self.rates.push(mebibytes as f64 / seconds);
    }
}

fn contains(json: &[u8], text: &[u8]) -> bool {
    json[..json.len().min(64)].windows(text.len()).any(|window| window == text)
}

fn main() {
    let runtime = |mut builder: tokio::runtime::Builder| builder.enable_all().build().unwrap();
    match std::env::args().skip_while(|argument| argument != PROXY).nth(1) {
        // Like nginx with one worker.
        Some(target) => runtime(tokio::runtime::Builder::new_current_thread()).block_on(serve_proxy(&target)),
        None => runtime(tokio::runtime::Builder::new_multi_thread()).block_on(bench()),
    }
}

async fn bench() {
    let mebibytes = rig::argument(256);
    let (_listener, url) = CodexExecutor::listening().await;
    let address = url.trim_start_matches("ws://").parse().unwrap();
    let straight = Harness::plain(rig::dial(address, &url).await, Tongue::Json);
    let nginx = Nginx::start(address).await;
    let (_proxy, proxy) = match &nginx {
        Some(nginx) => (None, nginx.address),
        None => proxy(address).await,
    };
    let url = format!("ws://{proxy}/");
    let proxied = Harness::plain(rig::dial(proxy, &url).await, Tongue::Json);

    let (_executor, link) = own_end::encrypted().await;
    let (_dialled, dialled) = own_end::direct().await;

    let state = Scratch::new();
    let gateway = DaemonProcess::start(&state, "127.0.0.1:0".parse().unwrap(), &["--log-level", "error"]).await;
    let (caller, credentials) = workspace(&state, &gateway).await;
    let url = format!("http://{}", gateway.address);
    let _connected = CodexExecutor::connected(&url, &credentials, &caller, "box").await;
    let plain = rig::create_executor(state.path(), gateway.address, "plain").await;
    let _direct = CodexExecutor::start_direct(&url, &plain, |_| {});
    _direct.seen_by(&caller, "plain").await;
    let bridged = Harness::open(&caller, &credentials.executor, Tongue::Json).await;
    let kept = Harness::open(&caller, &credentials.executor, Tongue::Encrypted).await;

    let mut ways = vec![
        Way::new("(1) straight, plain", straight).await,
        Way::new(if nginx.is_some() { "(2) nginx" } else { "(2) plain proxy" }, proxied).await,
        Way::new("(3) own end of an encrypted link", link.alone().await).await,
        Way::new("(4) gateway, encrypted link", bridged).await,
        Way::new("(4b) as (4), encrypted up to the harness", kept).await,
        Way::new("(5) own end of a plain link", dialled).await,
        Way::new("(6) gateway, plain link", Harness::open(&caller, &plain.executor, Tongue::Json).await).await,
    ];
    for round in 0..=ROUNDS {
        for way in &mut ways {
            way.ask().await;
            if round == 0 {
                // Warms everything up.
                way.p50.clear();
                way.requests.clear();
            }
        }
    }
    for _ in 0..PRINTS {
        for way in &mut ways {
            way.print(mebibytes).await;
        }
    }
    println!("{:<48} {:>8} {:>8} {:>10}", "bridge", "p50 us", "p99 us", "MiB/s");
    for way in &ways {
        let (p50, p99) = (rig::median(&way.requests) * 1e6, rig::percentile(&way.requests, 0.99) * 1e6);
        println!("{:<48} {p50:>8.0} {p99:>8.0} {:>10.0}", way.name, rig::median(&way.rates));
    }
    let added = |of: &Way, to: &Way| {
        let rounds: Vec<f64> = of.p50.iter().zip(&to.p50).map(|(of, to)| (of - to) * 1e6).collect();
        rig::median(&rounds)
    };
    let rate = |of: &Way, to: &Way| rig::ratio(&of.rates, &to.rates);
    let [straight, proxied, encrypted, bridged, kept, dialled, plain] = &ways[..] else { unreachable!("as above") };
    println!("{:<48} {:>8} {:>8}   reach", "", "added us", "MiB/s of");
    let row = |of: &Way, to: &Way, adds: &str, least: &str| {
        let what = format!("{} to {}", of.number(), to.number());
        println!("{what:<48} {:>8.0} {:>8.2}   {adds}{least}", added(of, to), rate(of, to));
    };
    let as_proxy = format!("<= {:.0} us, ", added(proxied, straight));
    row(proxied, straight, "", "");
    row(bridged, encrypted, &as_proxy, ">= 0.78");
    row(kept, encrypted, "", "");
    // What an executor that dials takes longer than one that listens is not the gateway's.
    row(dialled, straight, "", "");
    row(plain, dialled, "", "");
    row(plain, straight, "", ">= 0.78");
    println!(
        "p50 of (6) is {:.2} of (1), reach <= 1.28; it is {:.2} of (5), which is {:.2} of (1)",
        rig::ratio(&plain.p50, &straight.p50),
        rig::ratio(&plain.p50, &dialled.p50),
        rig::ratio(&dialled.p50, &straight.p50)
    );
}

/// nginx in one process in front of a WebSocket server.
struct Nginx {
    address: SocketAddr,
    _files: Scratch,
    _process: Child,
}

impl Nginx {
    /// `None` where it is not installed.
    async fn start(target: SocketAddr) -> Option<Self> {
        let (files, address) = (Scratch::new(), support::gateway::free_address());
        let directory = files.path().display();
        let config = format!(
            "daemon off; master_process off; pid {directory}/pid; error_log {directory}/error.log;
             events {{ }}
             http {{
                 access_log off; client_body_temp_path {directory}/b; proxy_temp_path {directory}/p;
                 fastcgi_temp_path {directory}/f; uwsgi_temp_path {directory}/u; scgi_temp_path {directory}/s;
                 server {{
                     listen {address};
                     location / {{
                         proxy_pass http://{target}; proxy_http_version 1.1; proxy_set_header Host $http_host;
                         proxy_set_header Upgrade $http_upgrade; proxy_set_header Connection upgrade;
                         proxy_buffering off; proxy_read_timeout 1h; tcp_nodelay on;
                     }}
                 }}
             }}"
        );
        let path = files.path().join("nginx.conf");
        std::fs::write(&path, config).unwrap();
        let mut command = Command::new("nginx");
        command
            .arg("-c")
            .arg(&path)
            .arg("-p")
            .arg(files.path())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .kill_on_drop(true);
        let process = command.spawn().ok()?;
        support::eventually("nginx serves", async || TcpStream::connect(address).await.ok()).await;
        Some(Self { address, _files: files, _process: process })
    }
}

/// A process of its own that copies bytes to an address and back.
async fn proxy(target: SocketAddr) -> (Option<Child>, SocketAddr) {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args([PROXY, &target.to_string()]).stdout(Stdio::piped()).kill_on_drop(true);
    let mut child = command.spawn().unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).await.unwrap();
    (Some(child), line.trim().parse().unwrap())
}

async fn serve_proxy(target: &str) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    println!("{}", listener.local_addr().unwrap());
    let (mut client, _) = listener.accept().await.unwrap();
    let mut server = TcpStream::connect(target).await.unwrap();
    client.set_nodelay(true).unwrap();
    server.set_nodelay(true).unwrap();
    let _ = tokio::io::copy_bidirectional(&mut client, &mut server).await;
}
