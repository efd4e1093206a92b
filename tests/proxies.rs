//! The gateway behind the proxies that `deploy/` has configurations for, changed in addresses and paths alone.
//! `make test-proxies`; a proxy that is not installed fails its test.

use std::fs::read_to_string;
use std::net::SocketAddr;
use std::path::Path;
use std::process::Stdio;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use http_body_util::BodyExt;
use serde_json::json;
use tokio::net::TcpStream;
use tokio::process::{Child, Command};

use crate::support::gateway::free_address;
use crate::support::{Caller, CodexExecutor, Harness, MIB, Scratch, TestGateway, Tongue, eventually, noise};

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs nginx"]
async fn everything_passes_nginx_and_no_query_string_is_logged() {
    passes(async |upstream, front, directory| {
        let (log, errors) = ("/var/log/nginx/exec-gateway.log", "/var/log/nginx/exec-gateway.error.log");
        let here = |name: &str| directory.join(name).display().to_string();
        let text = changed("nginx.conf", &[(log, &here("access.log")), (errors, &here("error.log"))]);
        let text = changed_text(text, &[("127.0.0.1:6060", &upstream.to_string())]);
        let whole = |text: &str| {
            let temporary = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
                .map(|kind| format!("{kind}_temp_path {};", here(&format!("{kind}.tmp"))));
            format!(
                "daemon off; pid {}; error_log {}; events {{}} http {{ {} {text} }}",
                here("pid"),
                here("start.log"),
                temporary.concat()
            )
        };
        let nginx = |name: &str, text: String| {
            std::fs::write(directory.join(name), text).unwrap();
            let mut command = Command::new("nginx");
            // Until it has read its configuration it logs to where it was built for.
            command.arg("-c").arg(directory.join(name)).arg("-e").arg(directory.join("start.log"));
            command
        };
        let certificate = ["req", "-x509", "-nodes", "-newkey", "rsa:2048", "-subj", "/CN=gateway.example"];
        let mut openssl = Command::new("openssl");
        openssl.args(certificate).args(["-keyout", &here("key"), "-out", &here("pem")]);
        assert!(openssl.output().await.unwrap().status.success());
        let (pem, key) = ("/etc/nginx/gateway.example.pem", "/etc/nginx/gateway.example.key");
        let with_tls = changed_text(text, &[(pem, &here("pem")), (key, &here("key"))]);
        let checked = nginx("tls.conf", whole(&with_tls)).arg("-t").output().await.unwrap();
        assert!(checked.status.success(), "{checked:?}");

        let plain = changed_text(with_tls, &[("listen 443 ssl;", &format!("listen {front};"))]);
        nginx("plain.conf", whole(&plain))
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs caddy"]
async fn everything_passes_caddy_and_no_query_string_is_logged() {
    passes(async |upstream, front, directory| {
        let log = format!("\tadmin off\n\tlog {{\n\t\toutput file {}", directory.join("access.log").display());
        let site = format!("http://{front} {{\n\tlog");
        let text = changed("Caddyfile", &[("\tlog {", &log), ("gateway.example {", &site)]);
        let text = changed_text(text, &[("127.0.0.1:6060", &upstream.to_string())]);
        let file = directory.join("Caddyfile");
        std::fs::write(&file, text).unwrap();
        let mut command = Command::new("caddy");
        command.args(["run", "--adapter", "caddyfile", "--config"]).arg(file);
        command.env("XDG_DATA_HOME", directory).env("XDG_CONFIG_HOME", directory);
        command
    })
    .await;
}

/// A configuration of `deploy/` with these texts replaced, each of which must be there.
fn changed(name: &str, changes: &[(&str, &str)]) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy").join(name);
    changed_text(read_to_string(path).unwrap(), changes)
}

fn changed_text(mut text: String, changes: &[(&str, &str)]) -> String {
    for (from, to) in changes {
        assert!(text.contains(from), "{from}");
        text = text.replace(from, to);
    }
    text
}

/// Starts the proxy's program and waits until it listens.
async fn listening(mut command: Command, front: SocketAddr) -> Child {
    let mut proxy = command.stdin(Stdio::null()).stderr(Stdio::null()).kill_on_drop(true).spawn().unwrap();
    eventually("the proxy listens", async || {
        assert_eq!(proxy.try_wait().unwrap(), None, "the proxy has ended");
        TcpStream::connect(front).await.ok()
    })
    .await;
    proxy
}

/// An executor, calls, events, sockets and large bodies through a proxy that is started by this command.
async fn passes(command: impl AsyncFn(SocketAddr, SocketAddr, &Path) -> Command) {
    let (gateway, directory, front) = (TestGateway::start().await, Scratch::new(), free_address());
    let mut proxy = listening(command(gateway.address(), front, directory.path()).await, front).await;
    let token = gateway.caller("w").await.token;
    let caller = Caller::new(front, token.clone());
    let credentials = gateway.executor("w", "box").await;
    let executor = CodexExecutor::connected(&format!("http://{front}"), &credentials, &caller, "box").await;
    assert_eq!(caller.shell("box", json!({ "command": "echo one" })).await["stdout"], "one\n");

    let (mut harness, _) = Harness::initialized(&caller, &credentials.executor, Tongue::Json).await;
    assert_eq!(harness.run("p", "echo two").await, ("two\n".to_owned(), 0));

    let content = noise(3, 24 * MIB);
    let write = json!({ "path": "large", "content_b64": STANDARD.encode(&content) });
    let written = caller.result("box", "write_file", write).await;
    assert_eq!(written["structuredContent"]["bytes"], content.len(), "{written}");
    assert_eq!(std::fs::read(executor.home().join("large")).unwrap(), content);

    // An event comes while the process still waits for its reader.
    let command = json!({ "command": "echo three; until [ -e go ]; do sleep 0.02; done; echo four" });
    let session = caller.result("box", "exec_command", command).await["structuredContent"]["session_id"].clone();
    let path = format!("/api/connectors/processes/{}/output", session.as_str().unwrap());
    let query = format!("{path}?since=0&token={}", token.as_deref().unwrap());
    let stranger = Caller::new(front, None);
    let answer = stranger.request("GET", &query, &[("accept", "text/event-stream")], "").await.unwrap();
    assert_eq!(answer.status(), 200);
    let (mut events, mut read) = (answer.into_body(), String::new());
    for (printed, then) in [("three\n", "go"), ("four\n", "gone")] {
        while !read.contains(&STANDARD.encode(printed)) {
            let frame = events.frame().await.expect("the events go on").unwrap();
            read += str::from_utf8(frame.data_ref().unwrap()).unwrap();
        }
        std::fs::write(executor.home().join(then), "").unwrap();
    }

    // What fails is logged too.
    gateway.gateway.run_until(async {}).await;
    assert_eq!(stranger.try_send("GET", &query, &[], "").await.unwrap().status, 502);
    let pid = proxy.id().unwrap().to_string();
    assert!(Command::new("kill").args(["-TERM", &pid]).status().await.unwrap().success());
    proxy.wait().await.unwrap();
    let files = std::fs::read_dir(directory.path()).unwrap().flatten().filter(|file| file.path().is_file());
    let logs: String = files.filter_map(|file| read_to_string(file.path()).ok()).collect();
    assert!(logs.contains(&path), "what is logged is looked at");
    assert!(!logs.contains("token=") && !logs.contains(token.as_deref().unwrap()), "{logs}");
}
