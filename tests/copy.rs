//! `copy_path` between real executors, within one, and through cuts and restarts (connectors-api.md §4.5, faults 53, 54).

use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::Path;

use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::support::gateway::{free_address, workspace};
use crate::support::{
    Caller, Credentials, DaemonProcess, MIB, Machine, Scratch, TestGateway, eventually, noise, peak_mib,
};

/// A caller of workspace `w` with two machines, `from` and `to`.
struct Pair {
    caller: Caller,
    from: Machine,
    to: Machine,
    gateway: TestGateway,
}

impl Pair {
    async fn start() -> Self {
        let gateway = TestGateway::start().await;
        let caller = gateway.caller("w").await;
        let machine = async |name: &str| {
            let credentials = gateway.executor("w", name).await;
            Machine::connected(gateway.address(), &credentials, &caller, name).await
        };
        let (from, to) = tokio::join!(machine("from"), machine("to"));
        Self { caller, from, to, gateway }
    }

    /// The result of a copy.
    async fn copy(&self, arguments: Value) -> Value {
        self.caller.result("from", "copy_path", between(arguments)).await
    }

    /// The structured part of one that is good.
    async fn copied(&self, arguments: Value) -> Value {
        let result = self.copy(arguments).await;
        assert_eq!(result["isError"], false, "{result}");
        let text: Value = serde_json::from_str(result["content"][0]["text"].as_str().unwrap()).unwrap();
        assert_eq!(text, result["structuredContent"]);
        text
    }

    /// Code and text of one that fails.
    async fn failure(&self, arguments: Value) -> (String, String) {
        let result = self.copy(arguments).await;
        assert_eq!(result["isError"], true, "{result}");
        let text = |value: &Value| value.as_str().unwrap().to_owned();
        (text(&result["structuredContent"]["code"]), text(&result["content"][0]["text"]))
    }

    async fn is_clean(&self) {
        self.from.is_clean().await;
        self.to.is_clean().await;
    }
}

fn between(arguments: Value) -> Value {
    let mut all = json!({ "source_environment_id": "from", "destination_environment_id": "to" });
    all.as_object_mut().unwrap().extend(arguments.as_object().unwrap().clone());
    all
}

fn sha256(content: &[u8]) -> String {
    format!("{:x}", Sha256::digest(content))
}

fn mode(path: &Path) -> u32 {
    path.symlink_metadata().unwrap().permissions().mode() & 0o7777
}

/// What a directory holds, with all that a copy keeps.
fn shape(root: &Path) -> Vec<(String, u32, String)> {
    let mut found = Vec::new();
    let mut open = vec![root.to_owned()];
    while let Some(directory) = open.pop() {
        for entry in std::fs::read_dir(&directory).unwrap() {
            let path = entry.unwrap().path();
            let kind = path.symlink_metadata().unwrap().file_type();
            let holds = if kind.is_symlink() {
                format!("link to {}", path.read_link().unwrap().display())
            } else if kind.is_dir() {
                open.push(path.clone());
                "directory".into()
            } else {
                sha256(&std::fs::read(&path).unwrap())
            };
            let mode = if kind.is_symlink() { 0 } else { mode(&path) };
            found.push((path.strip_prefix(root).unwrap().to_str().unwrap().to_owned(), mode, holds));
        }
    }
    found.sort();
    found
}

/// A directory with what is easily lost.
fn plant(root: &Path) {
    let at = |name: &str| root.join(name);
    for directory in ["empty", "deep/er/est", "-rf", "closed"] {
        std::fs::create_dir_all(at(directory)).unwrap();
    }
    for (name, content) in [
        ("script", noise(1, 1000)),
        ("deep/er/est/large", noise(2, 3 * MIB + 1)),
        ("deep/exact", noise(3, MIB)),
        ("nothing", Vec::new()),
        ("-rf/-n", b"dashes".to_vec()),
        ("it's \"$HOME\" `id`\nand a line", b"quotes".to_vec()),
        ("Grüße 🌍 \\n", b"letters".to_vec()),
        ("closed/inside", b"closed".to_vec()),
    ] {
        std::fs::write(at(name), content).unwrap();
    }
    let set = |name: &str, mode| std::fs::set_permissions(at(name), PermissionsExt::from_mode(mode)).unwrap();
    set("script", 0o755);
    set("nothing", 0o600);
    set("deep/er", 0o700);
    set("closed", 0o555);
    symlink("script", at("link")).unwrap();
    symlink("/does not/exist", at("deep/dangling")).unwrap();
    symlink("..", at("deep/up")).unwrap();
    symlink("-rf\n", at("-l")).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_is_copied_with_its_permissions_and_hash() {
    let pair = Pair::start().await;
    // Fault 53: the copy works over REST at all, and without curl or a relay.
    for (content, name) in [(noise(1, 5 * MIB + 3), "large"), (Vec::new(), "empty"), (b"x".to_vec(), "-n it's")] {
        std::fs::write(pair.from.file(name), &content).unwrap();
        std::fs::set_permissions(pair.from.file(name), PermissionsExt::from_mode(0o751)).unwrap();
        let copied = pair.copied(json!({ "source_path": name, "destination_path": format!("~/{name}") })).await;
        let told = (&copied["transport"], &copied["bytes"], &copied["sha256"]);
        assert_eq!(told, (&json!("ws"), &json!(content.len()), &json!(sha256(&content))));
        assert!(copied["duration_ms"].is_u64() && copied.get("files").is_none());
        assert!(std::fs::read(pair.to.file(name)).unwrap() == content, "{name} differs");
        assert_eq!(mode(&pair.to.file(name)), 0o751);
    }
    std::fs::write(pair.from.file("empty"), b"not empty any more").unwrap();
    pair.copied(json!({ "source_path": "empty", "destination_path": "large", "transport": "HTTP" })).await;
    assert_eq!(std::fs::read(pair.to.file("large")).unwrap(), b"not empty any more");
    pair.is_clean().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_directory_is_copied_with_all_it_holds() {
    let pair = Pair::start().await;
    plant(&pair.from.file("tree"));
    let pipe = std::process::Command::new("mkfifo").arg(pair.from.file("tree/pipe")).status().unwrap();
    assert!(pipe.success());
    let arguments = |to: &str| json!({ "source_path": "tree", "destination_path": to, "recursive": true });

    let copied = pair.copied(arguments("copy")).await;

    assert_eq!((&copied["files"], &copied["skipped"]), (&json!(8), &json!(["./pipe"])));
    std::fs::remove_file(pair.from.file("tree/pipe")).unwrap();
    assert_eq!(shape(&pair.to.file("copy")), shape(&pair.from.file("tree")));
    assert_eq!(mode(&pair.to.file("copy")), mode(&pair.from.file("tree")));
    pair.is_clean().await;

    assert_eq!(pair.failure(arguments("copy")).await.0, "exists", "nothing is merged");
    let mut flat = arguments("other");
    flat["recursive"] = json!(false);
    let (code, text) = pair.failure(flat).await;
    assert_eq!((code.as_str(), text.contains("source: ")), ("is_a_directory", true), "{text}");
    pair.is_clean().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn within_one_environment_the_executor_copies_by_itself() {
    let pair = Pair::start().await;
    let content = noise(9, 3 * MIB);
    std::fs::write(pair.from.file("file"), &content).unwrap();
    plant(&pair.from.file("tree"));
    let arguments = |from: &str, to: &str| json!({ "source_path": from, "destination_path": to, "destination_environment_id": "from", "recursive": true });

    let file = pair.copied(arguments("file", "copy")).await;
    assert_eq!((&file["transport"], &file["sha256"]), (&json!("local"), &json!(sha256(&content))));
    assert!(std::fs::read(pair.from.file("copy")).unwrap() == content, "the copy differs");

    let within = pair.copied(arguments("tree", "tree copy")).await;
    assert_eq!(shape(&pair.from.file("tree copy")), shape(&pair.from.file("tree")));
    let across = pair.copied(json!({ "source_path": "tree", "destination_path": "t", "recursive": true })).await;
    assert_eq!(within["sha256"], across["sha256"], "one tree has one sum");

    for to in ["tree", "tree/in/itself", "file"] {
        let from = if to == "file" { "file" } else { "tree" };
        assert!(["exists", "invalid"].contains(&pair.failure(arguments(from, to)).await.0.as_str()), "{to}");
    }
    pair.is_clean().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_copied_names_its_end() {
    let pair = Pair::start().await;
    std::fs::write(pair.from.file("file"), b"content").unwrap();
    std::fs::create_dir(pair.to.file("directory")).unwrap();
    for (from, to, code, end) in [
        ("missing", "file", "not_found", "source"),
        ("file", "no/directory", "not_found", "destination"),
        ("file", "directory", "is_a_directory", "destination"),
        ("file", "/dev/null", "not_a_file", "destination"),
        ("/dev/null", "file", "not_a_file", "source"),
        ("file", "/proc/x", "not_found", "destination"),
    ] {
        let (found, text) = pair.failure(json!({ "source_path": from, "destination_path": to })).await;
        assert!(
            found == code && text.starts_with(&format!("copy_path failed: {end}: ")),
            "{from} to {to}: {found}, {text}"
        );
    }
    let refused = async |caller: &Caller, change: Value| {
        let mut arguments = between(json!({ "source_path": "file", "destination_path": "copy" }));
        arguments.as_object_mut().unwrap().extend(change.as_object().unwrap().clone());
        let answer = caller.tool("from", "copy_path", arguments).await;
        let message = answer.json()["error"]["message"].as_str().unwrap().to_owned();
        (answer.status.as_u16(), answer.code(), message)
    };
    let bad = |message: &str| (400, "bad_arguments".to_owned(), message.to_owned());
    let wrong = refused(&pair.caller, json!({ "transport": "ftp" })).await;
    assert_eq!(wrong, bad("transport: invalid transport \"ftp\" (want auto|http|ws)"));
    assert_eq!(refused(&pair.caller, json!({ "source_path": "" })).await, bad("source_path: the path is empty"));
    // Another workspace's environment is an unknown one.
    pair.gateway.executor("other", "theirs").await;
    let unknown = |name: &str| (404, "env_not_found".to_owned(), format!("no environment named \"{name}\""));
    for name in ["theirs", "nobody's"] {
        for end in ["source_environment_id", "destination_environment_id"] {
            assert_eq!(refused(&pair.caller, json!({ end: name })).await, unknown(name));
        }
    }
    pair.is_clean().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_copy_that_is_given_up_leaves_nothing_behind() {
    let pair = Pair::start().await;
    std::fs::write(pair.from.file("file"), noise(4, 200 * MIB)).unwrap();
    std::fs::write(pair.to.file("copy"), b"former").unwrap();
    let arguments = between(json!({ "source_path": "file", "destination_path": "copy" }));
    let caller = pair.caller.clone();
    let call = tokio::spawn(async move { caller.tool("from", "copy_path", arguments).await });
    eventually("it is copying", async || (staged_bytes(&pair.to) > 2 * MIB as u64).then_some(())).await;
    call.abort();
    pair.is_clean().await;

    let quick = json!({ "source_path": "file", "destination_path": "copy", "timeout_ms": 400 });
    assert_eq!(pair.failure(quick).await.0, "timed_out");
    pair.is_clean().await;
    assert_eq!(std::fs::read(pair.to.file("copy")).unwrap(), b"former");
}

/// Bytes of what is staged.
fn staged_bytes(machine: &Machine) -> u64 {
    let sizes =
        machine.leftovers().into_iter().map(|name| std::fs::metadata(machine.file(&name)).map_or(0, |m| m.len()));
    sizes.sum()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_copy_goes_on_after_cuts_at_both_ends_and_a_gateway_that_was_killed() {
    copy_over_cuts_and_a_kill(256).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "takes a minute, 4 GiB of memory and 6 GiB of disk"]
async fn two_gibibytes_are_copied_over_cuts_and_a_kill_in_no_more_memory() {
    copy_over_cuts_and_a_kill(2048).await;
}

async fn copy_over_cuts_and_a_kill(mib: usize) {
    let size = mib * MIB + 777;
    let (state, address) = (Scratch::new(), free_address());
    let daemon = DaemonProcess::start(&state, address, &[]).await;
    let (caller, first) = workspace(&state, &daemon).await;
    let made = DaemonProcess::operate(&state, &["executor", "create", "--workspace", "w", "--name", "to"]).await;
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    let second = Credentials { executor: text(&made["exe_id"]), token: text(&made["token"]) };
    let (from, to) = tokio::join!(
        Machine::connected(address, &first, &caller, "box"),
        Machine::connected(address, &second, &caller, "to")
    );
    let mut content = noise(7, 8 * MIB).repeat(mib / 8 + 1);
    content.truncate(size);
    // No two blocks are the same.
    content.chunks_mut(MIB).zip(0_u64..).for_each(|(block, nth)| block[..8].copy_from_slice(&nth.to_le_bytes()));
    std::fs::write(from.file("file"), &content).unwrap();
    let arguments = json!({
        "source_environment_id": "box", "source_path": "file",
        "destination_environment_id": "to", "destination_path": "copy",
    });
    let call = |caller: Caller| {
        let arguments = arguments.clone();
        tokio::spawn(async move {
            let headers = [("content-type", "application/json")];
            let body = json!({ "tool": "copy_path", "arguments": arguments }).to_string();
            caller.try_send("POST", "/api/connectors/envs/box/tool/call", &headers, body).await
        })
    };
    let reached = async |bytes: usize| {
        eventually("it gets on", async || (staged_bytes(&to) >= bytes as u64).then_some(())).await;
    };

    let cut_off = call(caller.clone());
    reached(30 * MIB).await;
    from.proxy.cut();
    reached(60 * MIB).await;
    to.proxy.cut();
    reached(mib / 8 * 5 * MIB).await;
    let whole = to.leftovers().into_iter().find(|name| name.contains(".whole.")).expect("a whole is staged");
    let inode = std::fs::metadata(to.file(&whole)).unwrap().ino();
    let peak = peak_mib(daemon.pid());
    daemon.kill().await;
    assert!(cut_off.await.unwrap().is_err(), "the call ends with its gateway");
    assert!(!to.file("copy").exists(), "no part is seen");

    let daemon = DaemonProcess::start(&state, address, &[]).await;
    let answer = call(caller).await.unwrap().unwrap();

    let result = &answer.json()["structuredContent"];
    assert_eq!((&result["bytes"], &result["sha256"]), (&json!(size), &json!(sha256(&content))), "{answer:?}");
    assert!(std::fs::read(to.file("copy")).unwrap() == content, "the copy differs");
    assert_eq!(std::fs::metadata(to.file("copy")).unwrap().ino(), inode, "what was there already was taken up");
    let peaks = (peak, peak_mib(daemon.pid()));
    println!("{mib} MiB copied; most memory of the gateway before and after its restart: {peaks:?} MiB");
    assert!(peaks.0.max(peaks.1) < 160, "{peaks:?} MiB");
    from.is_clean().await;
    to.is_clean().await;
}
