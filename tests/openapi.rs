//! The description of the API: served, printed, and the same as what the doors do. That every answer of every other
//! test is as it says is for `support::described` to see.

use std::path::PathBuf;

use exec_gateway::config::Secret;
use exec_gateway::edge::router::TABLE;
use serde_json::{Value, json};

use tokio::process::Command;

use crate::support::described::{DOCUMENT, fault, mismatch};
use crate::support::{Caller, Scratch, TestGateway, Workbench};

#[tokio::test]
async fn the_description_is_served_without_a_credential_and_printed_by_the_command() {
    let gateway = TestGateway::start().await;
    let stranger = gateway.stranger();

    let served = stranger.send("GET", "/openapi.json", &[], "").await;
    let head = stranger.send("HEAD", "/openapi.json", &[], "").await;
    let printed = std::process::Command::new(env!("CARGO_BIN_EXE_exec-gateway")).arg("openapi").output().unwrap();

    assert_eq!((served.status.as_u16(), served.json()["openapi"].as_str()), (200, Some("3.1.0")));
    assert_eq!(served.json(), *DOCUMENT);
    assert_eq!(served.body, printed.stdout);
    assert_eq!(head.header("content-length"), Some(&*served.body.len().to_string()));
    assert!(head.body.is_empty());
}

const SHARED_SECRET: &str = "shared-secret-of-this-test-0001";
const INTERNAL_SECRET: &str = "internal-secret-of-this-test-01";

/// A gateway with all of its doors, and nothing to wait for behind them.
async fn bench() -> Workbench {
    Workbench::with(|config| {
        config.auth.shared_secret = Some(Secret::new(SHARED_SECRET.to_owned()));
        config.auth.internal_secret = Some(Secret::new(INTERNAL_SECRET.to_owned()));
        config.transfer.ticket_ttl_secs = 1;
    })
    .await
}

/// A request for every operation, by whoever calls it and whatever it carries, is answered as described: `Caller::send`
/// compares them.
#[tokio::test(flavor = "multi_thread")]
async fn every_operation_answers_as_described_whatever_it_is_sent() {
    let bench = bench().await;
    let started = bench.caller.result("box", "exec_command", json!({ "command": "cat", "key": "k" })).await;
    let session = started["structuredContent"]["session_id"].as_str().unwrap();
    let service = Caller::new(bench.gateway.address(), Some(SHARED_SECRET.to_owned()));
    let callers = [bench.caller.clone(), service, bench.gateway.stranger()];
    let (mut asked, mut succeeded) = (0, std::collections::BTreeSet::new());
    let (ends, others): (Vec<_>, Vec<_>) = TABLE.iter().partition(|row| row.methods.contains(&hyper::Method::DELETE));
    for row in others.into_iter().chain(ends) {
        for (path, method) in row.paths.iter().flat_map(|path| row.methods.iter().map(move |method| (path, method))) {
            let known = path
                .replace("{name}", "box")
                .replace("{sid}", session)
                .replace("{id}", &bench.credentials.executor)
                .replace("{wid}", "w");
            let unknown = path.replace(['{', '}'], "");
            let torn = path.split('{').next().unwrap().to_owned() + if path.contains('{') { "%ff" } else { "" };
            for target in [known, unknown, torn] {
                for query in
                    ["", "?path=f.txt&since=x", "?path=%ff&wait_ms=-1&stream=2&view=x", "?path=/&offset=1&token=x"]
                {
                    for body in [
                        "",
                        "{}",
                        "[]",
                        "{\"tool\":\"stat\",\"arguments\":{\"path\":\"/\"}}",
                        "\u{0}",
                        "{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"ping\"}",
                    ] {
                        let target = format!("{target}{query}");
                        let headers = [
                            ("content-type", "application/json"),
                            ("accept", "application/json, text/event-stream;q=0.1"),
                            ("x-internal-secret", INTERNAL_SECRET),
                            ("x-user-id", "somebody"),
                        ];
                        // A stream of events ends with its process.
                        let headers = if target.contains("/output") { &headers[2..] } else { &headers[..] };
                        for caller in &callers {
                            let answer = caller.send(method.as_str(), &target, headers, body).await;
                            asked += 1;
                            if answer.status.is_success() {
                                succeeded.insert(row.name);
                            }
                        }
                    }
                }
            }
        }
    }
    println!("{asked} requests; with success: {succeeded:?}");
    assert!(succeeded.len() >= 15, "{succeeded:?}");
}

#[test]
fn an_answer_that_is_not_described_is_seen() {
    let answer = |status: u16, media_type: &str, body: Value| crate::support::Answer {
        status: hyper::StatusCode::from_u16(status).unwrap(),
        headers: [("content-type", media_type), ("x-request-id", "r"), ("server-timing", "t")]
            .map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap()))
            .into_iter()
            .collect(),
        body: body.to_string().into(),
    };
    let path = "/api/sdk/processes?since=1";
    let seen = |status, media_type, body| fault("GET", path, &answer(status, media_type, body)).is_some();
    assert!(!seen(200, "application/json", json!({ "processes": [] })));
    assert!(seen(201, "application/json", json!({ "processes": [] })));
    assert!(seen(200, "text/plain", json!({ "processes": [] })));
    assert!(seen(200, "application/json", json!({ "processes": [{}] })));
    let error = |code: &str| json!({ "error": { "code": code, "message": "m" } });
    assert!(!seen(401, "application/json", error("invalid_token")));
    assert!(seen(401, "application/json", error("made_up")));
    assert!(mismatch(&json!({ "oneOf": [{ "type": "string" }, { "const": "a" }] }), &json!("a")).is_some());
}

#[tokio::test]
async fn a_list_in_the_place_of_a_registration_or_a_key_is_refused() {
    let gateway = TestGateway::start().await;
    let caller = gateway.caller("w").await;
    let executor = gateway.executor("w", "box").await;
    let own = Caller::new(gateway.address(), Some(executor.token.clone()));
    let path = |door: &str| format!("/cloud/environment/{}/{door}", executor.executor);
    for (caller, door) in [(&own, "register"), (&own, "direct/register"), (&own, "validate"), (&caller, "connect")] {
        let answer = caller.send("POST", &path(door), &[], "[null,null,null]").await;
        assert_eq!((answer.status.as_u16(), answer.code().as_str()), (400, "bad_request"), "{door}: {answer:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_number_that_is_none_is_refused_whether_it_is_used_or_not() {
    let bench = Workbench::start().await;
    let started = bench.caller.result("box", "exec_command", json!({ "command": "true" })).await;
    let session = started["structuredContent"]["session_id"].as_str().unwrap();
    for query in ["bytes=x", "bytes=-1", "max_bytes=", "wait_ms=1.5"] {
        let path = format!("/api/connectors/processes/{session}/output?{query}");
        let answer = bench.caller.send("GET", &path, &[], "").await;
        assert_eq!((answer.status.as_u16(), answer.code().as_str()), (400, "bad_request"), "{query}");
    }
}

#[tokio::test]
async fn an_id_that_the_protocol_does_not_know_is_not_given_back() {
    let gateway = TestGateway::start().await;
    let caller = gateway.caller("w").await;
    // Refused for want of `Accept`, whatever it asks for.
    let headers = [("content-type", "application/json")];
    for (id, told) in [("{}", json!(null)), ("[1]", json!(null)), ("\"a\"", json!("a")), ("7", json!(7))] {
        let message = format!("{{\"jsonrpc\":\"2.0\",\"id\":{id},\"method\":\"ping\"}}");
        let answer = caller.send("POST", "/mcp", &headers, message).await;
        assert_eq!((answer.status.as_u16(), &answer.json()["id"]), (406, &told), "{id}: {answer:?}");
    }
}

/// A file of what drives the API from outside.
fn driver(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/support/schemathesis").join(name)
}

/// A program of the environment that `make test-api` makes, in a directory for what it leaves behind.
fn program(name: &str, directory: &Scratch) -> Command {
    let program = driver("venv/bin").join(name);
    assert!(program.exists(), "schemathesis is not installed: run `make test-api`, which installs it");
    let mut command = Command::new(program);
    command.current_dir(directory.path()).env("PYTHONDONTWRITEBYTECODE", "1").kill_on_drop(true);
    command
}

#[tokio::test]
#[ignore = "needs programs that `make test-api` installs"]
async fn the_description_is_openapi_3_1() {
    let scratch = Scratch::new();
    let file = scratch.path().join("openapi.json");
    std::fs::write(&file, exec_gateway::api::openapi::text()).unwrap();
    let status =
        program("openapi-spec-validator", &scratch).args(["--schema", "3.1"]).arg(&file).status().await.unwrap();
    assert!(status.success());
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs programs that `make test-api` installs"]
async fn schemathesis_finds_no_answer_that_is_not_described() {
    let bench = bench().await;
    let root = bench.file("scratch");
    std::fs::create_dir(&root).unwrap();
    let started = bench.caller.result("box", "exec_command", json!({ "command": "cat" })).await;
    let unconnected = bench.gateway.executor("w", "unconnected").await;

    let scratch = Scratch::new();
    let mut command = program("schemathesis", &scratch);
    command
        .arg("--config-file")
        .arg(driver("schemathesis.toml"))
        .args(["run", &format!("{}/openapi.json", bench.gateway.url())])
        .env("SCHEMATHESIS_HOOKS", driver("hooks.py"))
        .env("SCRATCH", &root)
        .env("CALLER_TOKEN", bench.caller.token.as_deref().unwrap())
        .env("EXECUTOR", &bench.credentials.executor)
        .env("EXECUTOR_TOKEN", &unconnected.token)
        .env("UNCONNECTED", &unconnected.executor)
        .env("SESSION", started["structuredContent"]["session_id"].as_str().unwrap())
        .env("SHARED_SECRET", SHARED_SECRET)
        .env("INTERNAL_SECRET", INTERNAL_SECRET);

    assert!(command.status().await.unwrap().success());
}
