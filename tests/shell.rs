//! `shell` on the real executor.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use futures_util::future::join_all;
use serde_json::{Value, json};

use crate::support::{MIB, Marker, Workbench, eventually, noise};

/// Long enough that a command has started on a busy machine.
const SHORT_TIMEOUT_MS: u64 = 2000;

#[tokio::test(flavor = "multi_thread")]
async fn a_program_runs_with_its_arguments_as_they_are() {
    let bench = Workbench::start().await;

    let result = bench.shell(json!({ "command": ["echo", "hello", "$HOME  *"] })).await;

    assert_eq!(result["stdout"], "hello $HOME  *\n");
    assert_eq!((&result["exit_code"], &result["timed_out"]), (&json!(0), &json!(false)));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_string_runs_in_the_executors_shell_and_a_bad_exit_is_a_result() {
    let bench = Workbench::start().await;

    let result = bench.caller.result("box", "shell", json!({ "command": "echo $((6 * 7)) | cat; exit 3" })).await;

    assert_eq!(result["structuredContent"]["stdout"], "42\n");
    assert_eq!(result["structuredContent"]["exit_code"], 3);
    assert_eq!(result["isError"], false);
}

#[tokio::test(flavor = "multi_thread")]
async fn five_mib_of_any_bytes_arrive_exactly() {
    let bench = Workbench::start().await;
    let bytes = noise(5, 5 * MIB);
    std::fs::write(bench.file("noise"), &bytes).unwrap();

    let result = bench.shell(json!({ "command": ["cat", "noise"] })).await;

    assert!(decoded(&result["stdout_b64"]) == bytes, "stdout differs from the file");
    assert_eq!(result["exit_code"], 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn errors_are_kept_apart_from_output() {
    let bench = Workbench::start().await;

    let result = bench.caller.result("box", "shell", json!({ "command": "echo out; echo err >&2" })).await;

    assert_eq!(result["structuredContent"]["stdout"], "out\n");
    assert_eq!(result["structuredContent"]["stderr"], "err\n");
    assert_eq!(result["content"][0]["text"], "out\n\n--- stderr ---\nerr\n\n[exit_code=0]");
}

#[tokio::test(flavor = "multi_thread")]
async fn base64_is_added_exactly_where_bytes_are_not_text() {
    let bench = Workbench::start().await;
    // Three bytes a character and an odd start, so that every border of chunks falls into a character somewhere.
    let text = format!("x{}", "€".repeat(100_000));
    std::fs::write(bench.file("text"), &text).unwrap();

    let result = bench.shell(json!({ "command": "cat text; printf '\\377' >&2" })).await;
    assert!(result["stdout"] == text, "text was changed on its way");
    assert_eq!((result.get("stdout_b64"), &result["stderr_b64"]), (None, &json!("/w==")));

    let result = bench.shell(json!({ "command": "printf 'a\\303'; printf fine >&2" })).await;
    assert_eq!((decoded(&result["stdout_b64"]), result.get("stderr_b64")), (b"a\xc3".to_vec(), None));
    assert_eq!(result["stdout"], "a\u{fffd}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_timeout_is_a_result_with_what_was_said_before() {
    let bench = Workbench::start().await;
    let marker = Marker::new();

    let arguments = json!({ "command": format!("echo before; exec sleep {marker}"), "timeout_ms": SHORT_TIMEOUT_MS });
    let result = bench.caller.result("box", "shell", arguments).await;

    let structured = &result["structuredContent"];
    assert_eq!((&structured["stdout"], &structured["timed_out"]), (&json!("before\n"), &json!(true)));
    assert_eq!((&structured["exit_code"], &result["isError"]), (&Value::Null, &json!(true)));
    marker.is_on(0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_timeout_ends_a_child_whose_parent_has_left() {
    times_out_without_trace("sleep MARKER & echo started").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_timeout_ends_a_child_in_a_session_of_its_own() {
    times_out_without_trace("setsid sleep MARKER & echo started; wait").await;
}

/// Runs a command that says `started` and has a child that outlives its timeout.
async fn times_out_without_trace(command: &str) {
    let bench = Workbench::start().await;
    let marker = Marker::new();
    let command = command.replace("MARKER", &marker.to_string());

    let result = bench.shell(json!({ "command": command, "timeout_ms": SHORT_TIMEOUT_MS })).await;

    assert_eq!((&result["stdout"], &result["timed_out"]), (&json!("started\n"), &json!(true)));
    marker.is_on(0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn chatty_output_does_not_use_up_the_timeout() {
    let bench = Workbench::start().await;

    // Every line is a chunk of its own: far more than there are quarters of a second in the timeout.
    let command = "for i in $(seq 200); do echo $i; sleep 0.002; done";
    let result = bench.shell(json!({ "command": command, "timeout_ms": 20_000 })).await;

    let lines: String = (1..=200).map(|line| format!("{line}\n")).collect();
    assert_eq!((&result["stdout"], &result["exit_code"]), (&json!(lines), &json!(0)));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_children_say_after_the_exit_is_complete() {
    let bench = Workbench::start().await;

    let result = bench.shell(json!({ "command": "(sleep 0.3; echo late) & echo first; exit 4" })).await;

    assert_eq!((&result["stdout"], &result["exit_code"]), (&json!("first\nlate\n"), &json!(4)));
}

#[tokio::test(flavor = "multi_thread")]
async fn directories_are_taken_on_the_executor() {
    let bench = Workbench::of(
        |_| {},
        |command, home| {
            std::fs::create_dir_all(home.join("work/inner")).unwrap();
            command.current_dir(home.join("work"));
        },
    )
    .await;
    let home = bench.executor.home().canonicalize().unwrap();
    let runs_in = async |arguments: Value| bench.shell(arguments).await["stdout"].as_str().unwrap().trim().to_owned();
    let directory = |below: &str| home.join(below).display().to_string();

    assert_eq!(runs_in(json!({ "command": ["pwd", "-P"] })).await, directory("work"));
    assert_eq!(runs_in(json!({ "command": ["pwd", "-P"], "cwd": "inner" })).await, directory("work/inner"));
    assert_eq!(runs_in(json!({ "command": ["pwd", "-P"], "cwd": "~" })).await, home.display().to_string());
    assert_eq!(runs_in(json!({ "command": ["pwd", "-P"], "cwd": "~/work/inner" })).await, directory("work/inner"));
    assert_eq!(runs_in(json!({ "command": ["pwd", "-P"], "cwd": "/" })).await, "/");
}

#[tokio::test(flavor = "multi_thread")]
async fn variables_of_the_caller_lie_over_those_of_the_executor() {
    let bench = Workbench::of(
        |_| {},
        |command, _| {
            command.env("GREETING", "executor's").env("KEPT", "kept");
        },
    )
    .await;

    // Found by PATH although the caller gives variables of its own.
    let command = json!({ "command": ["printenv", "GREETING", "KEPT"], "env": { "GREETING": "caller's" } });
    let result = bench.shell(command).await;

    assert_eq!(result["stdout"], "caller's\nkept\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_executor_keeps_in_its_variables_never_reaches_a_command() {
    const SECRETS: [&str; 7] =
        ["CODEX_MARK", "OPENAI_MARK", "AWS_MARK", "EXEC_MARK", "MY_API_KEY", "SOME_SECRET", "MY_TOKEN"];
    let bench = Workbench::of(
        |_| {},
        |command, _| {
            command.envs(SECRETS.map(|name| (name, "leaked"))).env("PLAIN", "seen");
        },
    )
    .await;

    let result = bench.shell(json!({ "command": ["env"], "env": { "CODEX_OWN": "the caller's" } })).await;

    let variables: Vec<&str> = result["stdout"].as_str().unwrap().lines().collect();
    assert!(variables.contains(&"PLAIN=seen") && variables.contains(&"CODEX_OWN=the caller's"), "{variables:?}");
    let hidden = |line: &&&str| line.contains("leaked") || line.starts_with("CODEX_HOME=");
    assert_eq!(variables.iter().find(hidden), None);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_started_is_a_result_with_a_code() {
    let bench = Workbench::start().await;
    for arguments in [json!({ "command": ["no-such-program"] }), json!({ "command": ["true"], "cwd": "no/such/place" })]
    {
        let result = bench.caller.result("box", "shell", arguments).await;

        assert_eq!((&result["isError"], &result["structuredContent"]["code"]), (&json!(true), &json!("failed")));
        let text = result["content"][0]["text"].as_str().unwrap();
        assert!(text.starts_with("shell failed: No such file or directory"), "{text}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_caller_who_hangs_up_ends_the_command() {
    let bench = Workbench::with(|config| config.tools.keepalive_after_secs = 1).await;
    let marker = Marker::new();
    let sleep = json!({ "command": ["sleep", marker.to_string()] });

    let caller = bench.caller.clone();
    let call = tokio::spawn(async move { caller.shell("box", sleep).await });
    marker.is_on(1).await;
    call.abort();

    marker.is_on(0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_caller_who_hangs_up_between_spaces_ends_the_command() {
    let bench = Workbench::with(|config| config.tools.keepalive_after_secs = 1).await;
    let marker = Marker::new();
    let sleep = json!({ "tool": "shell", "arguments": { "command": ["sleep", marker.to_string()] } });

    // The head of the answer is there, and with it the first space.
    let answer = bench.caller.open("POST", "/api/connectors/envs/box/tool/call", sleep.to_string()).await;
    assert_eq!(answer.status(), 200);
    marker.is_on(1).await;
    drop(answer);

    marker.is_on(0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_long_call_sends_spaces_before_its_result() {
    let bench = Workbench::with(|config| {
        config.tools.keepalive_after_secs = 1;
        config.tools.keepalive_secs = 1;
    })
    .await;

    let answer = bench.caller.tool("box", "shell", json!({ "command": "sleep 2.2; echo done" })).await;

    assert_eq!((answer.status.as_u16(), answer.header("content-type")), (200, Some("application/json")));
    assert!(answer.body.starts_with(b"  "), "{answer:?}");
    assert_eq!(answer.json()["structuredContent"]["stdout"], "done\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn output_past_the_bound_of_one_answer_is_named() {
    let bench = Workbench::with(|config| config.tools.output_bytes_max = 65_536).await;
    std::fs::write(bench.file("long"), "y".repeat(100_000)).unwrap();

    let result = bench.caller.result("box", "shell", json!({ "command": "cat long; exit 5" })).await;

    let structured = &result["structuredContent"];
    assert_eq!(structured["stdout"].as_str().unwrap(), "y".repeat(65_536));
    assert_eq!((&structured["lost_bytes"], &structured["exit_code"]), (&json!(100_000 - 65_536), &json!(5)));
    assert!(result["content"][0]["text"].as_str().unwrap().contains("[34464 bytes of output past the bound"));
}

#[tokio::test(flavor = "multi_thread")]
async fn two_hundred_calls_at_once_are_not_mixed_up() {
    let bench = Workbench::start().await;

    let calls = (0..200).map(|call| {
        let command = format!("echo out {call}; echo err {call} >&2; exit {}", call % 100);
        bench.shell(json!({ "command": command }))
    });

    for (call, result) in join_all(calls).await.into_iter().enumerate() {
        assert_eq!(result["stdout"], format!("out {call}\n"));
        assert_eq!(result["stderr"], format!("err {call}\n"));
        assert_eq!(result["exit_code"], call % 100);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_call_does_not_hold_up_a_quick_one() {
    let bench = Workbench::start().await;
    let caller = bench.caller.clone();
    let slow = "touch started; while [ ! -e go ]; do sleep 0.02; done; echo slow";
    let slow = tokio::spawn(async move { caller.shell("box", json!({ "command": slow })).await });
    eventually("the slow call runs", async || bench.file("started").exists().then_some(())).await;

    let quick = bench.shell(json!({ "command": ["echo", "quick"] })).await;

    assert_eq!(quick["stdout"], "quick\n");
    assert!(!slow.is_finished(), "the slow call waits for a file that is not there");
    std::fs::write(bench.file("go"), "").unwrap();
    assert_eq!(slow.await.unwrap()["stdout"], "slow\n");
}

fn decoded(base64: &Value) -> Vec<u8> {
    STANDARD.decode(base64.as_str().unwrap()).unwrap()
}
