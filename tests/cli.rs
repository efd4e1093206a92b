//! The binary from outside: what it prints, how it exits, and what it leaves behind.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};

use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};

use crate::support::harness::{HarnessKeys, connect, dial};
use crate::support::{
    Caller, CodexExecutor, Credentials, DaemonProcess, FakeExecutor, Harness, Scratch, TestGateway, Tongue, codex,
    eventually,
};

/// The binary with an environment that holds nothing but a home and the programs that everything needs.
fn gateway(home: &Scratch, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_exec-gateway"));
    command.args(arguments).env_clear().env("HOME", home.path()).env("PATH", path()).stdin(Stdio::null());
    command.kill_on_drop(true);
    command
}

fn path() -> OsString {
    std::env::var_os("PATH").unwrap()
}

/// What a command that ended has printed.
struct Ran {
    code: Option<i32>,
    stdout: String,
    stderr: String,
}

impl From<Output> for Ran {
    fn from(output: Output) -> Self {
        let text = |bytes| String::from_utf8(bytes).unwrap();
        Self { code: output.status.code(), stdout: text(output.stdout), stderr: text(output.stderr) }
    }
}

async fn run(home: &Scratch, arguments: &[&str]) -> Ran {
    gateway(home, arguments).output().await.unwrap().into()
}

/// A command on a state directory that must succeed: its standard output.
async fn on_state(state: &Scratch, arguments: &[&str]) -> String {
    let ran = run(state, &[arguments, &["--state-dir", state.path().to_str().unwrap()]].concat()).await;
    assert_eq!(ran.code, Some(0), "{arguments:?}: {}", ran.stderr);
    ran.stdout
}

async fn daemon(state: &Scratch) -> DaemonProcess {
    DaemonProcess::start(state, "127.0.0.1:0".parse().unwrap(), &[]).await
}

/// Kills what a test started with its children.
struct Group(Child);

impl Drop for Group {
    fn drop(&mut self) {
        if let Some(pid) = self.0.id() {
            let _ = std::process::Command::new("kill").args(["-KILL", "--", &format!("-{pid}")]).status();
        }
    }
}

/// Processes that were started with this directory in their environment.
fn processes_with(directory: &Path) -> Vec<PathBuf> {
    let marked = |environment: Vec<u8>| {
        environment.windows(directory.as_os_str().len()).any(|part| part == directory.as_os_str().as_encoded_bytes())
    };
    let processes = std::fs::read_dir("/proc").unwrap().filter_map(|entry| Some(entry.ok()?.path()));
    processes.filter(|process| std::fs::read(process.join("environ")).is_ok_and(marked)).collect()
}

#[tokio::test]
async fn help_and_version_are_answers_and_a_wrong_command_line_is_a_usage_error() {
    let home = Scratch::new();
    for answered in [&["--help"][..], &["--version"], &["serve", "--help"], &["token", "create", "--help"]] {
        let ran = run(&home, answered).await;
        assert_eq!((ran.code, ran.stderr.as_str()), (Some(0), ""), "{answered:?}");
        assert!(!ran.stdout.is_empty(), "{answered:?}");
    }
    for wrong in
        [&[][..], &["sing"], &["serve", "--loud"], &["token", "create"], &["executor", "create", "--name", "a b"]]
    {
        let ran = run(&home, wrong).await;
        assert_eq!((ran.code, ran.stdout.as_str()), (Some(2), ""), "{wrong:?}");
        assert!(!ran.stderr.is_empty(), "{wrong:?}");
    }
}

#[tokio::test]
async fn what_cannot_be_done_exits_1_and_says_why_in_one_line() {
    let state = Scratch::new();
    let arguments = ["token", "revoke", "tok_000000000000", "--state-dir", state.path().to_str().unwrap()];
    let ran = run(&state, &arguments).await;
    assert_eq!((ran.code, ran.stderr.lines().count()), (Some(1), 1), "{}", ran.stderr);
}

#[tokio::test]
async fn check_names_every_fault_at_once() {
    let home = Scratch::new();
    let file = home.path().join("gateway.toml");
    std::fs::write(&file, "[link]\nping_secs = 99\ndead_secs = 5\npong_secs = 1\n").unwrap();
    let arguments = ["check", "--config", file.to_str().unwrap(), "--listen", "nowhere"];
    let ran: Ran = gateway(&home, &arguments).env("EXEC_GATEWAY_LOG_LEVEL", "loud").output().await.unwrap().into();
    assert_eq!((ran.code, ran.stdout.as_str()), (Some(2), ""));
    for fault in ["--listen", "EXEC_GATEWAY_LOG_LEVEL", "pong_secs", "dead_secs"] {
        assert!(ran.stderr.contains(fault), "{fault} is not in: {}", ran.stderr);
    }
    assert_eq!(run(&home, &["check"]).await.code, Some(0));
}

#[tokio::test]
async fn check_reads_the_files_that_the_configuration_names() {
    let home = Scratch::new();
    let path = |name: &str| home.path().join(name).display().to_string();
    let tls = |knob: &str, path: &str| [format!("--tls-{knob}"), path.to_owned()];
    for (certificate, key) in [("cert-a.pem", "key-a.pem"), ("cert-b.pem", "key-b.pem")] {
        let made = rcgen::generate_simple_self_signed(["gw.example".to_owned()]).unwrap();
        std::fs::write(path(certificate), made.cert.pem()).unwrap();
        std::fs::write(path(key), made.signing_key.serialize_pem()).unwrap();
    }
    let check = async |certificate: &str, key: &str| {
        let flags = [vec!["check".to_owned()], tls("certificate", certificate).into(), tls("key", key).into()].concat();
        run(&home, &flags.iter().map(String::as_str).collect::<Vec<_>>()).await
    };
    assert_eq!(check(&path("cert-a.pem"), &path("key-a.pem")).await.code, Some(0));
    for (certificate, key, told) in [
        (path("cert-a.pem"), path("key-b.pem"), "KeyMismatch"),
        (path("nowhere.pem"), path("key-a.pem"), "nowhere.pem"),
        (path("key-a.pem"), path("cert-a.pem"), "tls.certificate"),
    ] {
        let ran = check(&certificate, &key).await;
        assert_eq!(ran.code, Some(2), "{}", ran.stderr);
        assert!(ran.stderr.contains("tls.certificate") && ran.stderr.contains(told), "{told}: {}", ran.stderr);
    }
    let secret = run(&home, &["check", "--auth-shared-secret-file", &path("nowhere.secret")]).await;
    assert_eq!(secret.code, Some(2));
    assert!(secret.stderr.contains("nowhere.secret cannot be read"), "{}", secret.stderr);
}

#[tokio::test]
async fn man_pages_and_completions_know_every_command_and_every_knob() {
    let home = Scratch::new();
    for what in ["man", "completions"] {
        let ran = run(&home, &["generate", what, home.path().to_str().unwrap()]).await;
        assert_eq!((ran.code, ran.stderr.as_str()), (Some(0), ""), "{what}");
    }
    let read = |name: &str| std::fs::read_to_string(home.path().join(name)).unwrap();
    let (page, completions) = (read("exec-gateway.toml.5"), read("exec-gateway.bash"));
    let knobs: Vec<Value> = serde_json::from_str(&run(&home, &["config", "--json"]).await.stdout).unwrap();
    for knob in knobs {
        let name = knob["name"].as_str().unwrap();
        assert!(page.contains(&format!("EXEC_GATEWAY_{}", name.replace('.', "_").to_uppercase())), "{name}");
        let secret = name.ends_with("secret");
        assert_eq!(completions.contains(&format!(" --{} ", name.replace(['.', '_'], "-"))), !secret, "{name}");
    }
    for command in ["serve", "token-create", "executor-bind", "revoke"] {
        assert!(read(&format!("exec-gateway-{command}.1")).contains("SH SYNOPSIS"), "{command}");
    }
}

#[tokio::test]
async fn config_names_the_source_of_each_value_and_shows_no_secret() {
    let home = Scratch::new();
    let file = home.path().join("gateway.toml");
    std::fs::write(&file, "log_level = \"warn\"\n[link]\nping_secs = 7\n").unwrap();
    let arguments = ["config", "--json", "--config", file.to_str().unwrap(), "--log-level", "debug"];
    let mut command = gateway(&home, &arguments);
    command.env("EXEC_GATEWAY_AUTH_UPSTREAM_SECRET", "hunter2").env("EXEC_GATEWAY_DRAIN_GRACE_SECS", "9");
    let ran: Ran = command.output().await.unwrap().into();
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    assert!(!ran.stdout.contains("hunter2"), "{}", ran.stdout);
    let knobs: Vec<Value> = serde_json::from_str(&ran.stdout).unwrap();
    let knob = |name: &str| {
        let knob = knobs.iter().find(|knob| knob["name"] == name).unwrap();
        (knob["value"].clone(), knob["source"].as_str().unwrap())
    };
    assert_eq!(knob("log_level"), ("debug".into(), "flag"));
    assert_eq!(knob("drain.grace_secs"), (9.into(), "environment"));
    assert_eq!(knob("link.ping_secs"), (7.into(), "file"));
    assert_eq!(knob("link.dead_secs"), (60.into(), "default"));
    assert_eq!(knob("auth.upstream_secret").1, "environment");
}

#[tokio::test]
async fn a_token_is_printed_alone_and_counts_whether_or_not_a_daemon_runs() {
    let state = Scratch::new();
    let create = ["token", "create", "--workspace", "w"];
    let before = on_state(&state, &create).await;
    let gateway = daemon(&state).await;
    let during = on_state(&state, &create).await;
    for token in [&before, &during] {
        let token = token.strip_suffix('\n').unwrap();
        assert!(token.starts_with("egw_") && !token.contains(char::is_whitespace), "{token:?}");
        let caller = Caller::new(gateway.address, Some(token.to_owned()));
        assert_eq!(caller.environments().await, Vec::<String>::new());
    }
}

#[tokio::test]
async fn a_token_revoked_while_the_daemon_runs_ends_at_once() {
    let state = Scratch::new();
    let gateway = daemon(&state).await;
    let created = on_state(&state, &["token", "create", "--workspace", "w", "--json"]).await;
    let created: Value = serde_json::from_str(&created).unwrap();
    let caller = Caller::new(gateway.address, created["token"].as_str().map(String::from));
    caller.environments().await;
    on_state(&state, &["token", "revoke", created["id"].as_str().unwrap()]).await;
    let answer = caller.post("/api/connectors/envs/list", Value::Null).await;
    assert_eq!((answer.status.as_u16(), answer.code().as_str()), (401, "invalid_token"));
}

#[tokio::test]
async fn the_command_of_a_new_executor_connects_it_when_pasted() {
    let state = Scratch::new();
    let gateway = daemon(&state).await;
    let token = on_state(&state, &["token", "create", "--workspace", "w"]).await;
    let caller = Caller::new(gateway.address, Some(token.trim_end().to_owned()));
    let created = on_state(&state, &["executor", "create", "--workspace", "w", "--name", "box", "--json"]).await;
    let created: Value = serde_json::from_str(&created).unwrap();
    let mut fields: Vec<&String> = created.as_object().unwrap().keys().collect();
    fields.sort();
    assert_eq!(fields, ["command", "exe_id", "name", "token", "workspace"]);
    assert_eq!((created["name"].as_str(), created["workspace"].as_str()), (Some("box"), Some("w")));

    let mut programs = vec![codex::program().parent().unwrap().to_owned()];
    programs.extend(std::env::split_paths(&path()));
    let home = Scratch::new();
    let shell = Command::new("sh")
        .args(["-c", created["command"].as_str().unwrap()])
        .env_clear()
        .env("PATH", std::env::join_paths(programs).unwrap())
        .env("HOME", home.path())
        .env("CODEX_HOME", home.path())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .process_group(0)
        .spawn();
    let _executor = Group(shell.unwrap());
    eventually("the pasted command connects the executor", async || {
        (caller.environments().await == ["box"]).then_some(())
    })
    .await;
}

#[tokio::test]
async fn a_second_daemon_on_one_state_directory_ends_with_one_line() {
    let state = Scratch::new();
    let _first = daemon(&state).await;
    let directory = state.path().to_str().unwrap();
    let ports = ["--listen", "127.0.0.1:0", "--ops-listen", "127.0.0.1:0"];
    let ran = run(&state, &[&["serve", "--state-dir", directory], &ports[..]].concat()).await;
    assert_eq!((ran.code, ran.stderr.lines().count()), (Some(1), 1), "{}", ran.stderr);
    assert!(ran.stderr.contains(directory), "{}", ran.stderr);
}

#[tokio::test]
async fn the_ready_line_is_plain_text_at_any_level_and_format_and_term_exits_0() {
    let state = Scratch::new();
    let directory = state.path().to_str().unwrap();
    let arguments = ["serve", "--state-dir", directory, "--listen", "127.0.0.1:0", "--ops-listen", "127.0.0.1:0"];
    let mut command = gateway(&state, &[&arguments[..], &["--log-level", "error", "--log-format", "json"]].concat());
    let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
    let first = lines.next_line().await.unwrap().unwrap();
    let fields: Vec<&str> = first.split(' ').collect();
    assert!(
        matches!(fields[..], ["exec-gateway", "ready", listen, ops]
        if listen.starts_with("listen=127.0.0.1:") && ops.starts_with("ops=127.0.0.1:")),
        "{first}"
    );
    assert!(!first.contains(":0"), "real ports: {first}");
    terminate(&child);
    assert_eq!(child.wait().await.unwrap().code(), Some(0));
}

#[tokio::test]
async fn no_line_of_the_log_shows_a_credential() {
    let state = Scratch::new();
    let log = state.path().join("log");
    let arguments = ["serve", "--state-dir", state.path().to_str().unwrap(), "--listen", "127.0.0.1:0"];
    let loud = ["--ops-listen", "127.0.0.1:0", "--log-level", "trace"];
    let mut command = gateway(&state, &[&arguments[..], &loud].concat());
    let mut daemon = command.stderr(std::fs::File::create(&log).unwrap()).spawn().unwrap();
    let address = eventually("it is ready", async || {
        let log = std::fs::read_to_string(&log).unwrap();
        log.split_once("ready listen=")?.1.split_once(' ')?.0.parse().ok()
    })
    .await;

    let token = DaemonProcess::operate(&state, &["token", "create", "--workspace", "w"]).await;
    let caller = Caller::new(address, Some(token["token"].as_str().unwrap().to_owned()));
    let executor = DaemonProcess::operate(&state, &["executor", "create", "--workspace", "w", "--name", "box"]).await;
    let text = |name: &str| executor[name].as_str().unwrap().to_owned();
    let credentials = Credentials { executor: text("exe_id"), token: text("token") };
    let stand_in = FakeExecutor::new(address, &credentials);
    let url = stand_in.registered().await;
    let _link = stand_in.dial(&url).await.unwrap();
    eventually("it is connected", async || (caller.environments().await == ["box"]).then_some(())).await;
    assert_eq!(caller.shell("box", json!({ "command": "true" })).await["exit_code"], 0);
    let keys = HarnessKeys::new();
    let way = connect(&caller, &credentials.executor, &keys).await;
    let path = &way.url[way.url.find("/bridge").unwrap()..];
    dial(&Caller::new(address, None), path).await.unwrap();
    let (_harness, session) = Harness::initialized(&caller, &credentials.executor, Tongue::Json).await;
    let wrong = "a-credential-that-is-wrong";
    let door = format!("/bridge/{}?token={wrong}", credentials.executor);
    dial(&Caller::new(address, None), &door).await.unwrap_err();
    terminate(&daemon);
    assert_eq!(daemon.wait().await.unwrap().code(), Some(0));

    let log = std::fs::read_to_string(&log).unwrap();
    assert!(log.contains(&credentials.executor), "it says something about what went on: {log}");
    let ticket = url.split_once("token=").unwrap().1.split_once('&').unwrap().0;
    let (authorization, by) = path.split_once("token=").unwrap().1.split_once("&by=").unwrap();
    let token = caller.token.unwrap();
    for secret in [token.as_str(), &credentials.token, ticket, authorization, by, &session, wrong] {
        let line = log.lines().find(|line| line.contains(secret));
        assert_eq!(line, None);
    }
}

#[tokio::test]
async fn a_demonstration_makes_one_call_and_leaves_nothing_behind() {
    let (home, temporary) = (Scratch::new(), Scratch::new());
    let codex = codex::program();
    let mut command = gateway(&home, &["demo", "--once", "--codex", codex.to_str().unwrap()]);
    let ran: Ran = command.env("TMPDIR", temporary.path()).output().await.unwrap().into();
    assert_eq!((ran.code, ran.stderr.as_str()), (Some(0), ""), "{}", ran.stdout);
    assert!(ran.stdout.contains("hello from ") && ran.stdout.contains("exit code  0"), "{}", ran.stdout);
    assert!(!ran.stdout.contains("egw_"), "a token that has ended is of no use: {}", ran.stdout);
    assert_eq!(left_in(&temporary), Vec::<PathBuf>::new());
    eventually("no process is left", async || processes_with(temporary.path()).is_empty().then_some(())).await;
}

#[tokio::test]
async fn a_demonstration_serves_until_it_is_told_to_stop() {
    let (home, temporary) = (Scratch::new(), Scratch::new());
    let codex = codex::program();
    let mut command = gateway(&home, &["demo", "--codex", codex.to_str().unwrap()]);
    let mut child = command.env("TMPDIR", temporary.path()).stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let mut printed = Vec::new();
    while !printed.last().is_some_and(|line: &String| line.starts_with("curl ") && line.contains("read_file")) {
        printed.push(lines.next_line().await.unwrap().expect("the demonstration goes on"));
    }
    let token = printed.iter().find_map(|line| line.strip_prefix("token ")).unwrap().trim().to_owned();
    let list = printed.iter().find(|line| line.starts_with("curl ")).unwrap();
    let address = list.split("http://").nth(1).unwrap().split('/').next().unwrap();
    assert_eq!(Caller::new(address.parse().unwrap(), Some(token)).environments().await, ["box"]);

    terminate(&child);
    assert_eq!(child.wait().await.unwrap().code(), Some(0));
    assert_eq!(left_in(&temporary), Vec::<PathBuf>::new());
    eventually("no process is left", async || processes_with(temporary.path()).is_empty().then_some(())).await;
}

#[tokio::test]
async fn a_demonstration_whose_executor_gives_up_shows_its_last_words() {
    let (home, temporary) = (Scratch::new(), Scratch::new());
    let program = home.path().join("codex");
    // The name of the one option that an executor must know, then the refusal of everything else.
    let script = "#!/bin/sh\ncase \"$*\" in\n*--help) echo --registration-bearer-stdin;;\n--version) echo 0.1;;\n\
                  *) read -r token; echo \"not with $token\" >&2; exit 3;;\nesac\n";
    std::fs::write(&program, script).unwrap();
    std::fs::set_permissions(&program, std::os::unix::fs::PermissionsExt::from_mode(0o700)).unwrap();
    let mut command = gateway(&home, &["demo", "--once", "--codex", program.to_str().unwrap()]);
    let ran: Ran = command.env("TMPDIR", temporary.path()).output().await.unwrap().into();
    assert_eq!((ran.code, ran.stdout.as_str()), (Some(1), ""), "{}", ran.stderr);
    assert!(ran.stderr.contains("not with ***"), "{}", ran.stderr);
    assert_eq!(left_in(&temporary), Vec::<PathBuf>::new());
}

#[tokio::test]
async fn a_demonstration_without_codex_and_npm_ends_with_one_line() {
    let home = Scratch::new();
    let ran: Ran = gateway(&home, &["demo", "--once"]).env("PATH", home.path()).output().await.unwrap().into();
    assert_eq!((ran.code, ran.stdout.as_str(), ran.stderr.lines().count()), (Some(1), "", 1), "{}", ran.stderr);
    assert!(ran.stderr.contains("npm") && ran.stderr.contains("--codex"), "{}", ran.stderr);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_command_on_an_executor_may_be_this_binary() {
    let gateway = TestGateway::start().await;
    let caller = gateway.caller("w").await;
    let credentials = gateway.executor("w", "box").await;
    let _executor = CodexExecutor::connected(&gateway.url(), &credentials, &caller, "box").await;
    let result = caller.shell("box", json!({ "command": [env!("CARGO_BIN_EXE_exec-gateway"), "check"] })).await;
    assert_eq!((&result["stderr"], &result["exit_code"]), (&json!(""), &json!(0)));
}

fn left_in(directory: &Scratch) -> Vec<PathBuf> {
    std::fs::read_dir(directory.path()).unwrap().map(|entry| entry.unwrap().path()).collect()
}

fn terminate(child: &Child) {
    let pid = child.id().unwrap().to_string();
    assert!(std::process::Command::new("kill").args(["-TERM", &pid]).status().unwrap().success());
}
