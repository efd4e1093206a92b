//! Process sessions as tools: started, fed, read and ended by calls like any other.

use serde_json::{Value, json};

use crate::support::{Caller, Workbench};

async fn structured(caller: &Caller, tool: &str, arguments: Value) -> Value {
    let result = caller.result("box", tool, arguments).await;
    assert_eq!(result["isError"], false, "{result}");
    result["structuredContent"].clone()
}

async fn start(caller: &Caller, command: &str) -> String {
    let started = structured(caller, "exec_command", json!({ "command": command })).await;
    started["session_id"].as_str().unwrap().to_owned()
}

/// Reads on until so much text is there or the process is over; gives the text and the last answer.
async fn read(caller: &Caller, session: &str, enough: usize) -> (String, Value) {
    let (mut text, mut after) = (String::new(), json!(0));
    loop {
        let arguments = json!({ "session_id": session, "after_seq": after, "yield_time_ms": 25_000, "max_bytes": 1 });
        let answer = structured(caller, "read_output", arguments).await;
        text.push_str(answer["text"].as_str().unwrap());
        if text.len() >= enough || answer["session_alive"] == false {
            return (text, answer);
        }
        after = answer["next_seq"].clone();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_process_is_fed_read_and_seen_to_its_end_by_tools() {
    let bench = Workbench::start().await;
    let caller = &bench.caller;
    let session = start(caller, "cat; echo done >&2; exit 3").await;

    let written = structured(caller, "write_stdin", json!({ "session_id": session, "chars": "hällo €\n" })).await;
    assert_eq!(written, json!({ "accepted": 11, "eof": false }));
    assert_eq!(read(caller, &session, 11).await.0, "hällo €\n");
    let listed = structured(caller, "list_processes", json!({})).await;
    assert_eq!(
        (&listed["processes"][0]["session_id"], &listed["processes"][0]["state"]),
        (&json!(session), &json!("running"))
    );

    let ended =
        structured(caller, "write_stdin", json!({ "session_id": session, "data_b64": "/w==", "eof": true })).await;
    assert_eq!(ended, json!({ "accepted": 12, "eof": true }));
    let (text, last) = read(caller, &session, usize::MAX).await;
    assert_eq!(text, "hällo €\n\u{fffd}done\n");
    assert_eq!((&last["exit_code"], &last["state"]), (&json!(3), &json!("exited")));

    let arguments = json!({ "session_id": session, "chunks": true });
    let whole = caller.result("box", "read_output", arguments).await;
    let told = whole["content"][0]["text"].as_str().unwrap();
    assert!(told.ends_with("\n[exit_code=3]"), "{told}");
    let of_stderr =
        whole["structuredContent"]["chunks"].as_array().unwrap().iter().any(|chunk| chunk["stream"] == "stderr");
    assert!(of_stderr, "{whole}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_process_that_is_ended_says_how_and_can_still_be_read() {
    let bench = Workbench::start().await;
    let caller = &bench.caller;
    let session = start(caller, "echo before; exec sleep 600").await;
    read(caller, &session, 7).await;

    let ended = structured(caller, "terminate", json!({ "session_id": session })).await;

    assert_eq!(ended, json!({ "state": "exited", "exit_code": 137 }));
    assert_eq!(read(caller, &session, usize::MAX).await.0, "before\n");
    let late = caller.tool("box", "write_stdin", json!({ "session_id": session, "chars": "x" })).await;
    assert_eq!((late.status.as_u16(), late.code().as_str()), (409, "stdin_closed"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_of_another_workspace_or_environment_is_as_unknown_as_none() {
    let bench = Workbench::start().await;
    let session = start(&bench.caller, "sleep 600").await;
    let stranger = bench.gateway.caller("other").await;
    bench.gateway.executor("other", "box").await;
    bench.gateway.executor("w", "second").await;

    for (tool, more) in [("read_output", "after_seq"), ("write_stdin", "chars"), ("terminate", "grace_ms")] {
        let arguments = |session: &str| {
            let mut arguments = json!({ "session_id": session });
            arguments[more] = if more == "chars" { json!("x") } else { json!(0) };
            arguments
        };
        let unknown = stranger.tool("box", tool, arguments("nowhere")).await;
        let foreign = stranger.tool("box", tool, arguments(&session)).await;
        let elsewhere = bench.caller.tool("second", tool, arguments(&session)).await;
        assert_eq!((unknown.status.as_u16(), unknown.code().as_str()), (404, "session_not_found"), "{tool}");
        let told = |answer: &crate::support::Answer| String::from_utf8_lossy(&answer.body).replace(&session, "nowhere");
        assert_eq!(told(&foreign), told(&unknown), "{tool}");
        assert_eq!(told(&elsewhere), told(&unknown), "{tool}");
    }
    let here = structured(&bench.caller, "list_processes", json!({})).await;
    assert_eq!(here["processes"].as_array().unwrap().len(), 1);
    assert_eq!(structured(&stranger, "list_processes", json!({})).await, json!({ "processes": [] }));
}

#[tokio::test(flavor = "multi_thread")]
async fn environments_are_listed_by_name_whether_connected_or_not_and_never_by_id() {
    let bench = Workbench::start().await;
    bench.gateway.executor("w", "asleep").await;

    let result = bench.caller.result("box", "list_environments", json!({})).await;

    let listed = result["structuredContent"]["environments"].as_array().unwrap();
    let seen: Vec<_> = listed.iter().map(|env| (env["name"].as_str().unwrap(), env["connected"] == true)).collect();
    assert_eq!(seen, [("asleep", false), ("box", true)]);
    assert!(!result.to_string().contains("exe_"), "{result}");
}
