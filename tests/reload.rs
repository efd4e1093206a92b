//! Another configuration for a running gateway: what follows it, what is refused, and that nobody loses a call by it.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use exec_gateway::config::{LogLevel, Secret};
use exec_gateway::store::KeyPurpose;
use futures_util::future::join_all;
use serde_json::json;
use tokio::time::timeout;

use crate::support::gateway::workspace;
use crate::support::{Caller, CodexExecutor, DaemonProcess, Scratch, TestGateway, Upstream, Wire, eventually};

/// What a service is answered that shows this secret.
async fn revoke(gateway: &TestGateway, secret: &str) -> u16 {
    let service = Caller::new(gateway.address(), Some(secret.into()));
    service.post("/api/exec-gateway/revoke-turn", json!({ "turn_id": "t" })).await.status.as_u16()
}

fn secret(text: &str) -> Option<Secret> {
    Some(Secret::new(text.into()))
}

#[tokio::test]
async fn limits_follow_a_reload_and_a_faulty_one_changes_nothing() {
    let gateway = TestGateway::with(|config| config.edge.connections_max = 3).await;
    let caller = gateway.caller("w").await;
    let big = json!({ "tool": "shell", "arguments": { "command": "x".repeat(10_000) } });
    let size = async || caller.post("/api/connectors/envs/box/tool/call", big.clone()).await.status.as_u16();
    assert_eq!(size().await, 404, "there is no such environment, and the body is fine");

    let faults = gateway.reload(|config| {
        (config.edge.body_bytes_max, config.tools.timeout_secs) = (5000, 4000);
        config.tls.certificate = Some("/nowhere/certificate.pem".into());
        config.tls.key = Some("/nowhere/key.pem".into());
        config.auth.upstream_url = Some("https://upstream.test".into());
        config.auth.upstream_secret = secret("s");
        config.auth.upstream_authorities = Some("/nowhere/authorities.pem".into());
    });
    let places: Vec<String> = faults.unwrap_err().0.into_iter().map(|fault| fault.place).collect();
    assert_eq!(places, ["tools.timeout_secs", "tls.certificate", "auth.upstream_url"]);
    assert_eq!(size().await, 404, "nothing of it is in effect");

    let reloaded = gateway.reload(|config| {
        config.edge.body_bytes_max = 5000;
        config.log_level = LogLevel::Debug;
        config.listen = vec!["127.0.0.1:1".parse().unwrap()];
    });
    let reloaded = reloaded.unwrap();
    assert_eq!(reloaded.changed, ["log_level", "edge.body_bytes_max"]);
    assert_eq!(reloaded.kept, ["listen"]);
    assert_eq!(size().await, 413);

    // The caller's own connection is one.
    let (first, second) = (Wire::connect(gateway.address()).await, Wire::connect(gateway.address()).await);
    gateway.reload(|config| config.edge.connections_max = 1).unwrap();
    drop(first);
    // The listener had asked for this place before.
    assert_eq!(gateway.stranger().send("GET", "/healthz", &[], "").await.status, 200);
    drop(second);
    let client = gateway.stranger();
    let mut next = Box::pin(client.send("GET", "/healthz", &[], ""));
    assert!(timeout(Duration::from_millis(300), &mut next).await.is_err(), "one is open still");
    gateway.reload(|config| config.edge.connections_max = 2).unwrap();
    assert_eq!(next.await.status, 200);
}

#[tokio::test]
async fn a_secret_that_was_replaced_is_good_until_the_reload_after() {
    let gateway = TestGateway::with(|config| config.auth.shared_secret = secret("first")).await;
    assert_eq!((revoke(&gateway, "first").await, revoke(&gateway, "second").await), (204, 401));
    gateway.reload(|config| config.auth.shared_secret = secret("second")).unwrap();
    assert_eq!((revoke(&gateway, "first").await, revoke(&gateway, "second").await), (204, 204));
    gateway.reload(|_| {}).unwrap();
    assert_eq!((revoke(&gateway, "first").await, revoke(&gateway, "second").await), (401, 204));
    gateway.reload(|config| config.auth.shared_secret = None).unwrap();
    assert_eq!(revoke(&gateway, "second").await, 404, "a door without a secret is closed at once");
}

#[tokio::test]
async fn the_upstream_is_asked_where_it_is_and_with_the_secret_it_has_now() {
    let (old, new) = (Upstream::start().await, Upstream::start().await);
    old.knows_token("early", "w");
    new.knows_token("late", "w");
    let gateway = TestGateway::with(|config| old.configure(config)).await;
    let asks = async |token: &str| {
        let caller = Caller::new(gateway.address(), Some(token.into()));
        caller.post("/api/connectors/envs/list", json!({})).await.status.as_u16()
    };
    assert_eq!(asks("early").await, 200);
    new.expects("another secret");
    gateway
        .reload(|config| {
            new.configure(config);
            config.auth.upstream_secret = secret("another secret");
        })
        .unwrap();
    assert_eq!((asks("late").await, old.asked("late")), (200, 0));
    gateway.reload(|config| config.auth.upstream_url = None).unwrap();
    assert_eq!(asks("later").await, 401, "nobody is asked any more");
    assert_eq!(new.asked("later"), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_and_files_are_replaced_under_load_and_no_call_fails() {
    const ROUNDS: usize = 4;
    let (state, upstream) = (Scratch::new(), Upstream::start().await);
    upstream.knows_token("foreign", "w");
    let path = |name: &str| state.path().join(name);
    let (file, upstream_secret, shared) = (path("gateway.toml"), path("upstream.secret"), path("shared.secret"));
    let write = |calls_max: usize, secret: &str| {
        upstream.expects(secret);
        std::fs::write(&upstream_secret, secret).unwrap();
        std::fs::write(&shared, format!("{secret}-shared\n")).unwrap();
        let (url, upstream_secret, shared) = (upstream.address(), upstream_secret.display(), shared.display());
        let format = if calls_max == 1000 { "text" } else { "json" };
        let text = format!(
            "log_level = \"debug\"\nlog_format = \"{format}\"\n[workspace]\ncalls_max = {calls_max}\n\
             [auth]\npositive_ttl_secs = 1\nupstream_url = \"http://{url}\"\n\
             upstream_secret_file = \"{upstream_secret}\"\nshared_secret_file = \"{shared}\"\n"
        );
        std::fs::write(&file, text).unwrap();
    };
    write(1000, "secret-0");
    // The upstream takes the former secret too, as one does while it is rotated.
    let daemon =
        DaemonProcess::start(&state, "127.0.0.1:0".parse().unwrap(), &["--config", file.to_str().unwrap()]).await;
    let (caller, credentials) = workspace(&state, &daemon).await;
    let _executor = CodexExecutor::connected(&format!("http://{}", daemon.address), &credentials, &caller, "box").await;
    let foreign = Caller::new(daemon.address, Some("foreign".into()));

    let (done, calls, over) = (AtomicUsize::new(0), AtomicUsize::new(0), AtomicUsize::new(0));
    let call = async |caller: &Caller| {
        while over.load(Ordering::Relaxed) == 0 {
            let answer = caller.tool("box", "shell", json!({ "command": "echo here" })).await;
            assert_eq!(answer.status, 200, "{answer:?}");
            assert_eq!(answer.json()["structuredContent"]["stdout"], "here\n", "{answer:?}");
            calls.fetch_add(1, Ordering::Relaxed);
        }
    };
    let rotate = async {
        for round in 1..=ROUNDS {
            let before = calls.load(Ordering::Relaxed);
            write(1000 + round, &format!("secret-{round}"));
            daemon.hang_up().await;
            daemon.says("configuration, certificates and secrets were read again", round).await;
            let service = Caller::new(daemon.address, Some(format!("secret-{round}-shared")));
            let answer = service.post("/api/exec-gateway/revoke-turn", json!({ "turn_id": "t" })).await;
            assert_eq!(answer.status, 204, "{answer:?}");
            for purpose in KeyPurpose::ALL {
                // An executor's token lives through one rotation, and stands for itself here.
                if purpose != KeyPurpose::Executor {
                    DaemonProcess::operate(&state, &["key", "rotate", purpose.name()]).await;
                }
            }
            done.fetch_add(1, Ordering::Relaxed);
            eventually("calls go on", async || (calls.load(Ordering::Relaxed) > before + 20).then_some(())).await;
        }
        over.store(1, Ordering::Relaxed);
    };
    tokio::join!(join_all([&caller, &caller, &foreign, &foreign].map(&call)), rotate);
    assert_eq!(daemon.lines("needs a restart").iter().filter(|line| line.contains("log_format")).count(), ROUNDS);
    println!("{} calls over {ROUNDS} reloads and rotations of all keys, none failed", calls.load(Ordering::Relaxed));

    std::fs::write(&file, "listen = 7\n[workspace]\ncalls_maks = 1\n").unwrap();
    daemon.hang_up().await;
    daemon.says("everything stays as it was", 1).await;
    let faults = daemon.lines("wrong in the configuration");
    assert!(faults[0].contains("gateway.toml:1: `listen`: must be an array"), "{faults:?}");
    assert!(faults[1].contains("gateway.toml:3: unknown key `workspace.calls_maks` (did you mean"), "{faults:?}");
    assert_eq!(caller.environments().await, ["box"]);
}
