//! The tools over MCP: any client of the protocol lists and calls them, and what it leaves is ended.

use std::time::Duration;

use exec_gateway::admin::{Request, Response};
use exec_gateway::protocol::ids::WorkspaceId;
use exec_gateway::tools::{Effect, Tool};
use http_body_util::BodyExt;
use serde_json::{Value, json};

use crate::support::gateway::{free_address, workspace};
use crate::support::mcp::{ACCEPT, messages, post};
use crate::support::{Caller, CodexExecutor, DaemonProcess, MIB, Marker, Mcp, Scratch, TestGateway, Wire, Workbench};

async fn read_only(gateway: &TestGateway, workspace: &str) -> Caller {
    let workspace = WorkspaceId::new(workspace).unwrap();
    let request = Request::TokenCreate { workspace, user: None, ttl: None, read_only: true };
    let Response::Token { token, .. } = gateway.admin(request).await else { panic!("no token") };
    Caller::new(gateway.address(), Some(token.expose().to_owned()))
}

#[tokio::test]
async fn clients_of_every_revision_are_answered_in_theirs() {
    let gateway = TestGateway::start().await;
    let caller = gateway.caller("w").await;
    for version in ["2024-11-05", "2025-03-26", "2025-06-18", "2025-11-25"] {
        let client = Mcp::of_version(&caller, version).await;
        assert_eq!(client.greeting["protocolVersion"], version);
        assert_eq!(client.greeting["serverInfo"]["name"], "exec-gateway");
        assert!(client.tools().await.contains(&"shell".to_owned()), "{version}");
    }
    let newer = Mcp::of_version(&caller, "2099-01-01").await;
    assert_eq!(newer.greeting["protocolVersion"], "2025-11-25", "the newest with an introduction");
    // From 2026-07-28 on there is none: each request says what it speaks.
    let version = "2026-07-28";
    let client = json!({ "name": "test", "version": "1" });
    let meta = json!({
        "io.modelcontextprotocol/protocolVersion": version,
        "io.modelcontextprotocol/clientInfo": client,
        "io.modelcontextprotocol/clientCapabilities": {},
    });
    let list = json!({ "jsonrpc": "2.0", "id": 1, "method": "tools/list", "params": { "_meta": meta } });
    let answer = post(&caller, &[("mcp-protocol-version", version), ("mcp-method", "tools/list")], &list).await;
    assert!(answer.json()["result"]["tools"][0]["name"].is_string(), "{answer:?}");
}

#[tokio::test]
async fn every_tool_is_listed_with_its_schemas_and_what_it_may_do() {
    let gateway = TestGateway::start().await;
    let client = Mcp::connect(&gateway.caller("w").await).await;

    let listed = client.result("tools/list", json!({})).await;

    let listed = listed["tools"].as_array().unwrap();
    assert_eq!(listed.len(), Tool::ALL.len());
    for (tool, listed) in Tool::ALL.iter().zip(listed) {
        assert_eq!(listed["name"], tool.name());
        let hints = &listed["annotations"];
        assert_eq!(hints["readOnlyHint"], tool.effect() == Effect::Reads, "{listed}");
        assert_eq!(hints["destructiveHint"], tool.effect() == Effect::Destroys, "{listed}");
        assert_eq!(listed["outputSchema"]["type"], "object", "{listed}");
        let input = &listed["inputSchema"];
        assert_eq!(input["type"], "object", "{listed}");
        if tool.needs_environment() {
            assert_eq!(input["properties"]["environment_id"]["type"], "string", "{listed}");
        }
        // Optional everywhere.
        let required = input["required"].as_array().is_some_and(|all| all.contains(&json!("environment_id")));
        assert!(!required, "{listed}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tool_runs_where_it_is_told_or_where_there_is_no_doubt() {
    let bench = Workbench::start().await;
    let client = Mcp::connect(&bench.caller).await;

    let only = client.call("shell", json!({ "command": "echo here" })).await;
    assert_eq!((&only["structuredContent"]["stdout"], &only["isError"]), (&json!("here\n"), &json!(false)));
    assert_eq!(only["content"][0]["text"], "here\n\n[exit_code=0]");

    bench.gateway.executor("w", "second").await;
    let doubt = client.call("shell", json!({ "command": "true" })).await;
    assert_eq!(
        (&doubt["isError"], &doubt["structuredContent"]["code"]),
        (&json!(true), &json!("environment_required"))
    );
    let told = doubt["content"][0]["text"].as_str().unwrap();
    assert!(told.ends_with("box, second"), "{told}");
    let named = client.call("shell", json!({ "command": "echo named", "environment_id": "box" })).await;
    assert_eq!(named["structuredContent"]["stdout"], "named\n");
    let unknown = client.call("shell", json!({ "command": "true", "environment_id": "nowhere" })).await;
    assert_eq!(unknown["structuredContent"]["code"], "env_not_found");

    let other = TestGateway::start().await;
    let none = Mcp::connect(&other.caller("empty").await).await.call("shell", json!({ "command": "true" })).await;
    assert_eq!(none["content"][0]["text"], "the workspace has no environment");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_default_environment_is_meant_where_none_is_named() {
    let bench = Workbench::start().await;
    let (workspace, name) = (WorkspaceId::new("w").unwrap(), "main".parse().unwrap());
    bench.gateway.admin(Request::ExecutorCreate { workspace, name, default: true }).await;
    let client = Mcp::connect(&bench.caller).await;

    let result = client.call("shell", json!({ "command": "true" })).await;

    // It is not connected, and said to be the one that was meant.
    assert_eq!(result["structuredContent"]["code"], "executor_not_connected");
    assert!(result["content"][0]["text"].as_str().unwrap().contains("\"main\""), "{result}");
}

#[tokio::test]
async fn what_cannot_be_answered_is_said_in_the_words_of_the_protocol() {
    let gateway = TestGateway::start().await;
    let caller = gateway.caller("w").await;
    let client = Mcp::connect(&caller).await;

    let (unknown, _) = client.ask("tools/call", json!({ "name": "fly", "arguments": {} })).await;
    assert_eq!(
        (&unknown["error"]["code"], &unknown["error"]["message"]),
        (&json!(-32602), &json!("no such tool: fly"))
    );
    let (unknown, _) = client.ask("no/such/method", json!({})).await;
    assert_eq!(unknown["error"]["code"], -32601);

    gateway.executor("w", "box").await;
    let wrong = client.call("shell", json!({ "command": 5 })).await;
    assert_eq!((&wrong["isError"], &wrong["structuredContent"]["code"]), (&json!(true), &json!("bad_arguments")));
    assert!(wrong["content"][0]["text"].as_str().unwrap().starts_with("command: "), "{wrong}");
    let wrong = client.call("shell", json!({ "command": "true", "environment_id": 5 })).await;
    assert_eq!(wrong["content"][0]["text"], "environment_id: expected a string");

    assert_eq!(client.result("ping", json!({})).await, json!({}));
    assert_eq!(client.result("resources/list", json!({})).await, json!({ "resources": [] }));
    assert_eq!(client.result("resources/templates/list", json!({})).await, json!({ "resourceTemplates": [] }));
    assert_eq!(client.result("prompts/list", json!({})).await, json!({ "prompts": [] }));

    let json = ("content-type", "application/json");
    for (body, code) in [("{", -32700), ("[]", -32600), ("5", -32600), (r#"{"jsonrpc":"2.0","id":7}"#, -32600)] {
        let answer = caller.send("POST", "/mcp", &[ACCEPT, json], body).await;
        assert_eq!((answer.status.as_u16(), &answer.json()["error"]["code"]), (400, &json!(code)), "{body}");
    }
    let nameless = json!({ "jsonrpc": "2.0", "id": 7, "method": "tools/call", "params": {} });
    let answer = post(&caller, &[], &nameless).await.json();
    assert_eq!((&answer["id"], &answer["error"]["code"]), (&json!(7), &json!(-32602)), "{answer}");
    let answer = caller.send("POST", "/mcp", &[ACCEPT, ("content-type", "text/plain")], "{}").await;
    assert_eq!(answer.status, 415);
    let answer = caller.send("POST", "/mcp", &[("accept", "text/html"), json], nameless.to_string()).await;
    assert_eq!(answer.status, 406);
    let answer = post(&caller, &[("mcp-protocol-version", "1999-01-01")], &nameless).await;
    assert_eq!(answer.status, 400);
    for method in ["GET", "DELETE"] {
        let answer = caller.send(method, "/mcp", &[ACCEPT], "").await;
        assert_eq!((answer.status.as_u16(), answer.header("allow")), (405, Some("POST")), "{method}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_long_call_tells_its_progress_and_holds_up_no_other() {
    let bench = Workbench::with(|config| config.mcp.progress_secs = 1).await;
    let client = Mcp::connect(&bench.caller).await;
    let gate = bench.file("gate");
    let wait = json!({ "command": "until [ -e gate ]; do sleep 0.1; done; echo through" });
    let params = json!({ "name": "shell", "arguments": wait, "_meta": { "progressToken": "slow" } });

    let (slow, ()) = tokio::join!(client.ask("tools/call", params), async {
        for _ in 0..3 {
            let quick = client.call("shell", json!({ "command": "echo quick" })).await;
            assert_eq!(quick["structuredContent"]["stdout"], "quick\n");
            tokio::time::sleep(Duration::from_millis(800)).await;
        }
        std::fs::write(&gate, "").unwrap();
    });

    let (answer, told) = slow;
    assert_eq!(answer["result"]["structuredContent"]["stdout"], "through\n", "{answer}");
    assert!(!told.is_empty(), "it was told nothing");
    let progress: Vec<f64> = told.iter().map(|told| told["params"]["progress"].as_f64().unwrap()).collect();
    assert!(progress.is_sorted_by(|one, next| one < next), "{told:?}");
    assert!(told.iter().all(|told| told["method"] == "notifications/progress"), "{told:?}");
    assert!(told.iter().all(|told| told["params"]["progressToken"] == "slow"), "{told:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancelled_call_leaves_no_process_and_only_its_own_client_can_cancel_it() {
    let bench = Workbench::start().await;
    let (client, other) = (Mcp::connect(&bench.caller).await, Mcp::connect(&bench.caller).await);
    let marker = Marker::new();
    let sleep = json!({ "name": "shell", "arguments": { "command": format!("sleep {marker} & exec sleep {marker}") } });

    let (call, ()) = tokio::join!(client.ask_as(1000, "tools/call", sleep), async {
        marker.is_on(2).await;
        let accepted = other.notify("notifications/cancelled", json!({ "requestId": 1000 })).await;
        assert_eq!(accepted.status, 202);
        let wrong = client.notify("notifications/cancelled", json!({ "requestId": "1000" })).await;
        assert_eq!(wrong.status, 202);
        assert_eq!(other.call("shell", json!({ "command": "echo on" })).await["structuredContent"]["stdout"], "on\n");
        assert_eq!(marker.processes().len(), 2, "another client's call was cancelled");
        client.notify("notifications/cancelled", json!({ "requestId": 1000, "reason": "enough" })).await;
    });

    assert_eq!(call.0["result"]["structuredContent"]["code"], "cancelled", "{call:?}");
    marker.is_on(0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_leaves_takes_its_call_along() {
    for progress in [json!({}), json!({ "progressToken": 1 })] {
        let bench = Workbench::with(|config| config.mcp.progress_secs = 1).await;
        let marker = Marker::new();
        let arguments = json!({ "command": format!("exec sleep {marker}") });
        let params = json!({ "name": "shell", "arguments": arguments, "_meta": progress });
        let message = json!({ "jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": params });
        let headers = [ACCEPT, ("content-type", "application/json")];
        let caller = bench.caller.clone();
        let calling = tokio::spawn(async move {
            let answer = caller.request("POST", "/mcp", &headers, message.to_string()).await.unwrap();
            answer.into_body().collect().await.map(drop)
        });
        marker.is_on(1).await;

        calling.abort();

        marker.is_on(0).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_answer_begins_as_events_and_says_at_its_end_where_the_time_went() {
    let bench = Workbench::with(|config| {
        config.tools.keepalive_after_secs = 1;
        config.tools.keepalive_secs = 1;
    })
    .await;
    let arguments = json!({ "command": "sleep 2.5; echo late" });
    let params = json!({ "name": "shell", "arguments": arguments });
    let message = json!({ "jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": params });
    let headers = [ACCEPT, ("content-type", "application/json"), ("te", "trailers")];

    let answer = bench.caller.request("POST", "/mcp", &headers, message.to_string()).await.unwrap();

    let (head, body) = answer.into_parts();
    assert_eq!(head.headers["content-type"], "text/event-stream");
    let body = body.collect().await.unwrap();
    let timing = body.trailers().expect("trailers")["server-timing"].to_str().unwrap().to_owned();
    assert!(phase(&timing, "executor") > 2000.0, "{timing}");
    let text = String::from_utf8(body.to_bytes().to_vec()).unwrap();
    assert!(text.starts_with(": "), "{text}");
    assert_eq!(text.matches("data: ").count(), 1, "{text}");
    assert!(text.contains(r#""stdout":"late\n""#), "{text}");
}

fn phase(timing: &str, name: &str) -> f64 {
    let entry = timing.split(", ").find_map(|entry| entry.strip_prefix(name)?.strip_prefix(";dur="));
    entry.unwrap_or_else(|| panic!("no {name}: {timing}")).parse().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn every_call_says_where_its_time_went() {
    let bench = Workbench::start().await;
    let client = Mcp::connect(&bench.caller).await;
    let list = json!({ "jsonrpc": "2.0", "id": 1, "method": "tools/list", "params": {} });
    let refused = bench.gateway.stranger();
    let answers = [
        bench.caller.tool("box", "shell", json!({ "command": "sleep 0.2" })).await,
        bench.caller.tool("nowhere", "shell", json!({ "command": "true" })).await,
        bench.caller.post("/api/connectors/envs/list", json!({})).await,
        bench.caller.send("GET", "/api/connectors/processes", &[], "").await,
        bench.caller.send("GET", "/api/connectors/processes/nowhere/output", &[], "").await,
        refused.post("/api/connectors/envs/list", json!({})).await,
        post(&client.caller, &[], &list).await,
    ];
    for answer in &answers {
        let timing = answer.header("server-timing").unwrap_or_else(|| panic!("{answer:?}"));
        for name in ["auth", "route", "queue", "executor"] {
            assert!(phase(timing, name) >= 0.0, "{timing}");
        }
    }
    assert!(phase(answers[0].header("server-timing").unwrap(), "executor") >= 200.0, "{answers:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn output_too_long_for_a_model_is_cut_and_kept_whole_in_a_session() {
    let bench = Workbench::start().await;
    let client = Mcp::connect(&bench.caller).await;
    let command = "seq 1 100000; seq 1 20000 >&2; printf 'end\\377'; exit 4";

    let result = client.call("shell", json!({ "command": command })).await;

    let content = &result["structuredContent"];
    assert_eq!((&content["exit_code"], &content["stdout_b64"]), (&json!(4), &Value::Null));
    let (stdout, stderr) = (content["stdout"].as_str().unwrap(), content["stderr"].as_str().unwrap());
    assert!(stdout.starts_with("1\n2\n") && stdout.ends_with("100000\nend\u{fffd}"), "{stdout}");
    assert!(stderr.starts_with("1\n2\n") && stderr.ends_with("20000\n"), "{stderr}");
    let session = content["session_id"].as_str().unwrap();
    let text = result["content"][0]["text"].as_str().unwrap();
    assert!(text.len() < 66 * 1024, "{} bytes", text.len());
    assert_eq!(text.matches(&format!("left out here; read_output with session_id {session} shows all")).count(), 2);

    let (mut all, mut after) = (String::new(), 0);
    let last = loop {
        let page = client.call("read_output", json!({ "session_id": session, "after_seq": after })).await;
        let page = page["structuredContent"].clone();
        all.push_str(page["text"].as_str().unwrap());
        if page["session_alive"] == false {
            break page;
        }
        after = page["next_seq"].as_u64().unwrap();
    };
    let count = |upto: u32| (1..=upto).map(|n| format!("{n}\n")).collect::<String>();
    assert!(all == format!("{}end\u{fffd}{}", count(100_000), count(20_000)), "what was kept differs");
    assert_eq!(last["exit_code"], 4);

    let short = client.call("shell", json!({ "command": "seq 1 1000" })).await;
    assert_eq!(
        (&short["structuredContent"]["session_id"], short["content"][0]["text"].as_str().unwrap().len()),
        (&Value::Null, 3907)
    );
    // Over REST the caller takes all of it, and nothing is kept.
    assert_eq!(bench.shell(json!({ "command": command })).await["stdout_b64"].as_str().unwrap().len(), 785_200);
    assert_eq!(
        bench.caller.send("GET", "/api/connectors/processes", &[], "").await.json()["processes"]
            .as_array()
            .unwrap()
            .len(),
        1
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn large_arguments_arrive_and_larger_ones_are_refused_clearly() {
    let bench = Workbench::start().await;
    let client = Mcp::connect(&bench.caller).await;

    let written = client.call("write_file", json!({ "path": "large", "content_b64": "QUJD".repeat(MIB) })).await;

    assert_eq!(written["isError"], false, "{written}");
    assert_eq!(std::fs::metadata(bench.file("large")).unwrap().len() as usize, 3 * MIB);
    let token = bench.caller.token.as_deref().unwrap();
    let mut wire = Wire::connect(bench.gateway.address()).await;
    wire.send(&format!(
        "POST /mcp HTTP/1.1\r\nhost: gw\r\nauthorization: Bearer {token}\r\ncontent-type: application/json\r\n\
         content-length: 99999999\r\n\r\n"
    ))
    .await;
    let refused = wire.receive().await;
    assert!(refused.starts_with("HTTP/1.1 413 ") && refused.contains(r#""code":"body_too_large""#), "{refused}");
    let long = client.call("read_file", json!({ "path": "large" })).await;
    assert_eq!((&long["isError"], &long["structuredContent"]["code"]), (&json!(true), &json!("too_large")), "{long}");
}

#[tokio::test]
async fn without_a_good_token_a_client_learns_how_to_come_by_one() {
    let gateway = TestGateway::with(|config| {
        config.public_url = Some("https://gateway.example/base".into());
        config.mcp.authorization_servers = vec!["https://login.example".into()];
    })
    .await;
    let list = json!({ "jsonrpc": "2.0", "id": 1, "method": "tools/list" });
    let document = "https://gateway.example/base/.well-known/oauth-protected-resource/mcp";

    let missing = post(&gateway.stranger(), &[], &list).await;
    assert_eq!(missing.status, 401);
    assert_eq!(missing.header("www-authenticate"), Some(&*format!("Bearer resource_metadata=\"{document}\"")));
    assert_eq!(missing.json()["error"]["data"]["code"], "missing_bearer");
    let wrong = post(&Caller::new(gateway.address(), Some("wrong".into())), &[], &list).await;
    let challenge = format!("Bearer error=\"invalid_token\", resource_metadata=\"{document}\"");
    assert_eq!((wrong.status.as_u16(), wrong.header("www-authenticate")), (401, Some(&*challenge)));

    for (path, resource) in [
        ("/.well-known/oauth-protected-resource", "/mcp"),
        ("/.well-known/oauth-protected-resource/mcp", "/mcp"),
        ("/.well-known/oauth-protected-resource/v1/mcp", "/v1/mcp"),
        ("/v1/.well-known/oauth-protected-resource", "/v1/mcp"),
    ] {
        let document = gateway.stranger().send("GET", path, &[], "").await.json();
        assert_eq!(document["resource"], format!("https://gateway.example/base{resource}"), "{path}");
        assert_eq!(document["authorization_servers"], json!(["https://login.example"]));
        assert_eq!(document["bearer_methods_supported"], json!(["header"]));
    }
}

#[tokio::test]
async fn pages_of_other_sites_may_not_call() {
    let gateway = TestGateway::with(|config| {
        config.public_url = Some("https://gateway.example/base".into());
        config.mcp.allowed_origins = vec!["https://app.example".into()];
    })
    .await;
    let caller = gateway.caller("w").await;
    let ping = json!({ "jsonrpc": "2.0", "id": 1, "method": "ping" });
    for (origin, status) in [
        ("https://app.example", 200),
        ("https://gateway.example", 200),
        ("http://localhost:6274", 200),
        ("http://127.0.0.1", 200),
        ("http://[::1]:80", 200),
        ("http://app.example", 403),
        ("https://app.example:444", 403),
        ("http://evil.example", 403),
        ("http://localhost.evil.example", 403),
        ("http://localhost:80@evil.example", 403),
        ("null", 403),
        ("", 403),
    ] {
        let answer = post(&caller, &[("origin", origin)], &ping).await;
        assert_eq!(answer.status, status, "{origin}: {answer:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_that_only_reads_calls_every_reading_tool_and_no_other() {
    let bench = Workbench::start().await;
    let caller = read_only(&bench.gateway, "w").await;
    let client = Mcp::connect(&caller).await;
    let reading = |tool: &&&Tool| tool.effect() == Effect::Reads;
    let readers: Vec<_> = Tool::ALL.iter().filter(reading).map(|tool| tool.name().to_owned()).collect();

    assert_eq!(client.tools().await, readers);
    assert!(readers.contains(&"read_file".to_owned()) && !readers.contains(&"shell".to_owned()), "{readers:?}");
    for tool in Tool::ALL {
        // Arguments that no tool takes: who gets as far as them was let in.
        let rest = caller.tool("box", tool.name(), json!({ "session_id": 5, "path": 5, "command": 5 })).await;
        let over_mcp = client.call(tool.name(), json!({ "session_id": 5, "path": 5, "command": 5 })).await;
        let code = over_mcp["structuredContent"]["code"].as_str().unwrap_or("none");
        if tool.effect() == Effect::Reads {
            assert_ne!(rest.status, 403, "{}", tool.name());
            assert_ne!(code, "forbidden", "{}", tool.name());
        } else {
            assert_eq!((rest.status.as_u16(), rest.code().as_str()), (403, "forbidden"), "{}", tool.name());
            assert_eq!(code, "forbidden", "{}", tool.name());
        }
    }
    std::fs::write(bench.file("note"), "readable").unwrap();
    let read = client.call("read_file", json!({ "path": "note" })).await;
    assert_eq!(read["content"][0]["text"], "cmVhZGFibGU=");
    let started = bench.caller.result("box", "exec_command", json!({ "command": "echo seen" })).await;
    let session = &started["structuredContent"]["session_id"];
    let arguments = json!({ "session_id": session, "yield_time_ms": 25_000 });
    let seen = client.call("read_output", arguments).await;
    assert_eq!(seen["structuredContent"]["text"], "seen\n", "{seen}");
    assert_eq!(
        client.call("list_processes", json!({})).await["structuredContent"]["processes"][0]["session_id"],
        *session
    );
    assert_eq!(
        client.call("list_environments", json!({})).await["structuredContent"]["environments"][0]["name"],
        "box"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_that_is_revoked_takes_its_calls_along() {
    let bench = Workbench::start().await;
    let (caller, id) = bench.gateway.caller_and_token("w").await;
    let client = Mcp::connect(&caller).await;
    let marker = Marker::new();

    let (result, ()) =
        tokio::join!(client.call("shell", json!({ "command": format!("exec sleep {marker}") })), async {
            marker.is_on(1).await;
            bench.gateway.admin(Request::TokenRevoke { id }).await;
        });

    assert_eq!((&result["isError"], &result["structuredContent"]["code"]), (&json!(true), &json!("invalid_token")));
    marker.is_on(0).await;
    let ping = json!({ "jsonrpc": "2.0", "id": 1, "method": "ping" });
    assert_eq!(post(&caller, &[], &ping).await.status, 401);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_goes_on_at_the_next_gateway_as_if_nothing_had_happened() {
    let (state, address) = (Scratch::new(), free_address());
    let daemon = DaemonProcess::start(&state, address, &[]).await;
    let (caller, credentials) = workspace(&state, &daemon).await;
    let executor = CodexExecutor::connected(&format!("http://{address}"), &credentials, &caller, "box").await;
    let client = Mcp::connect(&caller).await;
    let started = client.call("exec_command", json!({ "command": "cat" })).await;
    let session = started["structuredContent"]["session_id"].clone();
    let long = client.call("shell", json!({ "command": "seq 1 20000" })).await;
    let kept = long["structuredContent"]["session_id"].clone();

    daemon.kill().await;
    let _daemon = DaemonProcess::start(&state, address, &[]).await;
    executor.seen_by(&caller, "box").await;

    let written = client.call("write_stdin", json!({ "session_id": session, "chars": "still\n" })).await;
    assert_eq!(written["structuredContent"]["accepted"], 6, "{written}");
    let read = client.call("read_output", json!({ "session_id": session, "yield_time_ms": 25_000 })).await;
    assert_eq!(read["structuredContent"]["text"], "still\n", "{read}");
    let read = client.call("read_output", json!({ "session_id": kept })).await;
    assert!(read["structuredContent"]["text"].as_str().unwrap().starts_with("1\n2\n"), "{read}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_workspace_that_has_no_place_for_a_call_can_still_cancel_one() {
    let bench = Workbench::with(|config| config.workspace.calls_max = 1).await;
    let client = Mcp::connect(&bench.caller).await;
    let marker = Marker::new();
    let sleep = json!({ "name": "shell", "arguments": { "command": format!("exec sleep {marker}") } });

    let (call, ()) = tokio::join!(client.ask_as(7, "tools/call", sleep), async {
        marker.is_on(1).await;
        let ping = json!({ "jsonrpc": "2.0", "id": 1, "method": "ping", "params": { "filler": "x".repeat(8192) } });
        for message in [json!({ "jsonrpc": "2.0", "id": 1, "method": "ping" }), ping] {
            let refused = post(&bench.caller, &[], &message).await;
            let code = refused.json()["error"]["data"]["code"].clone();
            assert_eq!((refused.status.as_u16(), code), (429, json!("too_many_calls")));
        }
        client.notify("notifications/cancelled", json!({ "requestId": 7 })).await;
    });

    assert_eq!(call.0["result"]["structuredContent"]["code"], "cancelled");
    marker.is_on(0).await;
}

#[tokio::test]
async fn a_gateway_that_restarts_sends_clients_to_the_next() {
    let gateway = TestGateway::start().await;
    let caller = gateway.caller("w").await;
    gateway.gateway.api().draining.cancel();

    let refused = post(&caller, &[], &json!({ "jsonrpc": "2.0", "id": 1, "method": "ping" })).await;

    assert_eq!((refused.status.as_u16(), refused.header("retry-after")), (503, Some("1")));
    assert_eq!(refused.json()["error"]["data"]["code"], "draining");
}

#[tokio::test(flavor = "multi_thread")]
async fn calls_of_clients_without_a_name_are_cancelled_where_there_is_no_doubt() {
    let bench = Workbench::start().await;
    let marker = Marker::new();
    let call = json!({ "jsonrpc": "2.0", "id": 1, "method": "tools/call",
        "params": { "name": "shell", "arguments": { "command": format!("exec sleep {marker}") } } });
    let cancel = json!({ "jsonrpc": "2.0", "method": "notifications/cancelled", "params": { "requestId": 1 } });
    let stranger = bench.gateway.caller("w").await;

    let (answer, ()) = tokio::join!(post(&bench.caller, &[], &call), async {
        marker.is_on(1).await;
        // Another credential's call 1 is another call.
        assert_eq!(post(&stranger, &[], &cancel).await.status, 202);
        assert_eq!(post(&bench.caller, &[], &cancel).await.status, 202);
    });

    assert_eq!(messages(&answer)[0]["result"]["structuredContent"]["code"], "cancelled", "{answer:?}");
    marker.is_on(0).await;
}
