//! What process sessions endure on the real executor: lost links and executors, killed gateways, full disks, more output
//! than there is room for, and that nothing of them is left when their time is over.

use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use exec_gateway::admin::Request;
use exec_gateway::config::Config;
use exec_gateway::protocol::ids::{ExecutorId, WorkspaceId};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::sessions::{Started, sha256, start};
use crate::support::gateway::{free_address, workspace};
use crate::support::{
    Caller, CodexExecutor, Credentials, DaemonProcess, FakeExecutor, MIB, Marker, Proxy, Reply, Scratch, TestGateway,
    Workbench, eventually, noise,
};

/// The real daemon and the real executor, with a link between them that can be cut.
pub struct Rig {
    state: Scratch,
    pub address: SocketAddr,
    /// The daemon's listening socket where it outlives the daemon.
    held: Option<TcpListener>,
    daemon: Option<DaemonProcess>,
    pub caller: Caller,
    pub credentials: Credentials,
    pub proxy: Proxy,
    executor: CodexExecutor,
}

impl Rig {
    pub async fn start() -> Self {
        Self::with(&[]).await
    }

    /// On a daemon with further arguments.
    async fn with(arguments: &[&str]) -> Self {
        Self::on(Scratch::new(), arguments).await
    }

    async fn on(state: Scratch, arguments: &[&str]) -> Self {
        let daemon = DaemonProcess::start(&state, free_address(), arguments).await;
        Self::of(state, None, daemon).await
    }

    /// On a listening socket that stays open while the daemon is away.
    pub async fn on_held_socket() -> Self {
        let (state, held) = (Scratch::new(), TcpListener::bind("127.0.0.1:0").unwrap());
        let daemon = DaemonProcess::start_on(&state, &held, None).await;
        Self::of(state, Some(held), daemon).await
    }

    async fn of(state: Scratch, held: Option<TcpListener>, daemon: DaemonProcess) -> Self {
        let address = daemon.address;
        let (caller, credentials) = workspace(&state, &daemon).await;
        let proxy = Proxy::to(address).await;
        let url = format!("http://{}", proxy.address);
        let executor = CodexExecutor::connected(&url, &credentials, &caller, "box").await;
        Self { state, address, held, daemon: Some(daemon), caller, credentials, proxy, executor }
    }

    pub async fn kill_and_restart(&mut self) {
        self.daemon.take().unwrap().kill().await;
        self.restart().await;
    }

    pub async fn stop_and_restart(&mut self) {
        assert_eq!(self.daemon.take().unwrap().terminate().await, Some(0));
        self.restart().await;
    }

    async fn restart(&mut self) {
        self.daemon = Some(match &self.held {
            Some(held) => DaemonProcess::start_on(&self.state, held, None).await,
            None => DaemonProcess::start(&self.state, self.address, &[]).await,
        });
    }

    pub fn file(&self, name: &str) -> PathBuf {
        self.executor.home().join(name)
    }

    fn resident_mib(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.daemon.as_ref().unwrap().pid())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
        line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() / 1024
    }
}

/// One chunk of a page.
fn bytes_of(chunk: &Value) -> Vec<u8> {
    STANDARD.decode(chunk["data_b64"].as_str().unwrap()).unwrap()
}

impl Started<'_> {
    /// Hands every page to `take` until the session is over; gives the last one.
    async fn follow(&self, bytes_max: usize, mut take: impl FnMut(&Value)) -> Value {
        let mut since = 0;
        loop {
            let page = self.get(&format!("/output?since={since}&wait_ms=5000&max_bytes={bytes_max}")).await;
            take(&page);
            since = page["next_since"].as_u64().unwrap();
            if page["session_alive"] == false {
                return page;
            }
        }
    }

    /// Reads what there is; gives the number of the newest chunk.
    async fn follow_running(&self) -> u64 {
        let mut since = 0;
        loop {
            let page = self.get(&format!("/output?since={since}")).await;
            if page["chunks"].as_array().unwrap().is_empty() && page["lost"].is_null() {
                return since;
            }
            since = page["next_since"].as_u64().unwrap();
        }
    }

    async fn becomes(&self, state: &str) -> Value {
        eventually(&format!("the session is {state}"), async || {
            let shown = self.get("").await;
            (shown["state"] == state).then_some(shown)
        })
        .await
    }

    async fn prints(&self, text: &str) {
        eventually(&format!("the session prints {text}"), async || {
            let page = self.get("/output?since=0&wait_ms=1000").await;
            let printed: Vec<u8> = page["chunks"].as_array().unwrap().iter().flat_map(bytes_of).collect();
            String::from_utf8_lossy(&printed).contains(text).then_some(())
        })
        .await;
    }

    /// Writes all bytes, block after block by offset; what fails is sent again, as a caller does that knows no better.
    async fn feed(&self, bytes: &[u8]) {
        let mut offset = 0;
        while offset < bytes.len() {
            let end = (offset + 512 * 1024).min(bytes.len());
            let body = json!({ "data_b64": STANDARD.encode(&bytes[offset..end]), "offset": offset }).to_string();
            let path = format!("/api/connectors/processes/{}/stdin", self.id);
            eventually("the block is accepted", async || {
                let answer = self.caller.try_send("POST", &path, &[], body.clone()).await.ok()?;
                assert!(matches!(answer.status.as_u16(), 200 | 429 | 503), "{answer:?}");
                (answer.status == 200).then(|| assert_eq!(answer.json()["accepted"], end))
            })
            .await;
            offset = end;
        }
    }

    async fn accepted(&self, bytes: usize) {
        eventually("stdin is accepted", async || {
            (self.get("").await["stdin_accepted"].as_u64()? >= bytes as u64).then_some(())
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn stdin_arrives_exactly_once_while_the_link_is_cut_and_the_gateway_killed() {
    let mut rig = Rig::start().await;
    let caller = rig.caller.clone();
    let bytes = noise(3, 10 * MIB);
    let digest = start(&caller, json!({ "command": ["sha256sum"] })).await;
    let echo = start(&caller, json!({ "command": ["cat"], "stdin": "open" })).await;
    let disturb = async {
        digest.accepted(2 * MIB).await;
        rig.proxy.cut();
        digest.accepted(5 * MIB).await;
        rig.kill_and_restart().await;
        digest.accepted(8 * MIB).await;
        rig.proxy.cut();
    };
    let feed = async {
        digest.feed(&bytes).await;
        assert_eq!(digest.post("stdin", json!({ "eof": true })).await.json()["accepted"], bytes.len());
    };
    tokio::join!(feed, echo.feed(&bytes), disturb);

    assert_eq!(digest.read_all().await.stdout, format!("{}  -\n", sha256(&bytes)).into_bytes());
    eventually("all of it is echoed", async || (echo.get("").await["stdout_bytes"] == bytes.len()).then_some(())).await;
    echo.post("terminate", json!({})).await;
    let printed = echo.read_all().await;
    assert!(printed.stdout == bytes, "{} bytes came back", printed.stdout.len());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_fast_process_prints_while_its_link_is_away_is_named_exactly() {
    let rig = Rig::start().await;
    let bytes = noise(5, 64 * MIB);
    std::fs::write(rig.file("block"), &bytes).unwrap();
    // The second half waits until the link is away; `dd` prints pieces of which the executor makes whole chunks.
    let command = "dd if=block bs=65536 count=512; while [ ! -e go ]; do sleep 0.05; done; \
                   dd if=block bs=65536 skip=512; touch done; exec sleep 600";
    let fast = start(&rig.caller, json!({ "command": format!("exec 2>/dev/null; {command}") })).await;
    let half = bytes.len() / 2;
    eventually("the first half arrives", async || (fast.get("").await["stdout_bytes"] == half).then_some(())).await;
    rig.proxy.shut();
    std::fs::write(rig.file("go"), "").unwrap();
    eventually("the second half is printed", async || rig.file("done").exists().then_some(())).await;
    rig.proxy.open();

    let mut streamed = Vec::new();
    let mut gap = None;
    let end = async {
        eventually("the link is back", async || {
            (fast.get("").await["stdout_bytes"].as_u64()? > half as u64).then_some(())
        })
        .await;
        fast.post("terminate", json!({})).await;
    };
    let follow = fast.follow(8 * MIB, |page| {
        for chunk in page["chunks"].as_array().unwrap() {
            if let Some(chunks) = chunk["gap"]["chunks"].as_u64().filter(|chunks| *chunks > 0) {
                assert!(chunk["gap"]["bytes"].is_null(), "nobody can know them: {chunk}");
                assert!(gap.replace((streamed.len(), chunks)).is_none(), "one gap");
            }
            streamed.extend(bytes_of(chunk));
        }
    });
    let (last, ()) = tokio::join!(follow, end);

    let (at, chunks) = gap.expect("a gap");
    let (prefix, suffix) = streamed.split_at(at);
    let lost = bytes.len() - streamed.len();
    println!("64 MiB, cut: {} bytes exact, {chunks} chunks lost = {lost} bytes, {} bytes exact", at, suffix.len());
    assert!(prefix == &bytes[..at] && at >= half);
    assert!(suffix == &bytes[bytes.len() - suffix.len()..] && suffix.len() >= MIB - 64 * 1024);
    // A chunk is at most 8 KiB, so as many as are named were needed for what is missing.
    assert!(chunks as usize * 8192 >= lost && (chunks as usize) < lost / 8192 + 64, "{chunks} for {lost}");
    let stdout = &last["exit"]["streams"]["stdout"];
    assert_eq!((&stdout["exact"], &stdout["sha256"]), (&json!(false), &Value::Null));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_exit_among_output_that_is_fetched_later_is_not_taken_for_a_loss() {
    let rig = Rig::start().await;
    // What was left behind prints when the process itself is over.
    let command = "main=$$; (while kill -0 $main; do sleep 0.05; done; echo late; touch done) 2>/dev/null & \
                   echo early; while [ ! -e leave ]; do sleep 0.05; done; exit 5";
    let session = start(&rig.caller, json!({ "command": command, "stdin": "none" })).await;
    session.prints("early").await;
    rig.proxy.shut();
    std::fs::write(rig.file("leave"), "").unwrap();
    eventually("the rest is printed", async || rig.file("done").exists().then_some(())).await;
    rig.proxy.open();
    let printed = session.read_all().await;
    assert_eq!(printed.stdout, b"early\nlate\n");
    assert_eq!(printed.last["exit_code"], 5);
    assert_eq!(printed.last["exit"]["streams"]["stdout"]["exact"], true);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_exit_before_the_gateway_was_killed_is_not_taken_for_one_of_the_chunks_lost_meanwhile() {
    let mut rig = Rig::start().await;
    let piece = 8192;
    let bytes = noise(6, 512 * piece);
    std::fs::write(rig.file("block"), &bytes).unwrap();
    // What was left behind prints when the process itself is over, in pieces that become one chunk each.
    let command = "main=$$; (while kill -0 $main; do sleep 0.02; done; echo late; \
                   while [ ! -e go ]; do sleep 0.02; done; dd if=block bs=8192; touch done) 2>/dev/null & exit 5";
    let caller = rig.caller.clone();
    let session = start(&caller, json!({ "command": command, "stdin": "none" })).await;
    session.prints("late").await;
    rig.daemon.take().unwrap().kill().await;
    std::fs::write(rig.file("go"), "").unwrap();
    eventually("all is printed", async || rig.file("done").exists().then_some(())).await;
    rig.daemon = Some(DaemonProcess::start(&rig.state, rig.address, &[]).await);

    let (mut kept, mut lost) = (0, 0);
    let last = session
        .follow(8 * MIB, |page| {
            for chunk in page["chunks"].as_array().unwrap() {
                kept += bytes_of(chunk).len();
                lost += chunk["gap"]["chunks"].as_u64().unwrap_or(0) as usize;
            }
        })
        .await;
    assert_eq!(kept + lost * piece, "late\n".len() + bytes.len(), "{lost} chunks lost");
    assert!(lost > 0);
    assert_eq!(last["exit_code"], 5);
}

/// Piece `number` of a long output: never the same as another.
fn piece(number: usize, block: &[u8]) -> Vec<u8> {
    let mut piece = format!("{number:08}").into_bytes();
    piece.extend_from_slice(block);
    piece
}

#[tokio::test(flavor = "multi_thread")]
async fn output_beyond_memory_and_quota_is_exact_for_who_reads_along_and_its_newest_part_afterwards() {
    // Unoptimised it takes 20 times as long, so there is less of it.
    let (pieces, quota) = if cfg!(debug_assertions) { (8, 24 * MIB) } else { (64, 256 * MIB) };
    let rig = Rig::with(&["--session-spill-bytes-max", &quota.to_string()]).await;
    let block = noise(9, 8 * MIB);
    std::fs::write(rig.file("block"), &block).unwrap();
    let total = pieces * (block.len() + 8);
    // Nobody is slowed down for a reader, and on a busy machine this one falls behind: the process waits for it before the
    // quota is used up.
    let command = format!(
        "i=0; while [ $i -lt {pieces} ]; do until [ -e go.$i ]; do sleep 0.02; done; printf %08d $i; cat block; \
         i=$((i+1)); done"
    );
    let mut allowed = 0;
    let mut allow = |read: usize| {
        while allowed < read / (block.len() + 8) + quota / (12 * MIB) {
            std::fs::write(rig.file(&format!("go.{allowed}")), "").unwrap();
            allowed += 1;
        }
    };
    allow(0);
    let started = std::time::Instant::now();
    let big = start(&rig.caller, json!({ "command": command, "stdin": "none" })).await;
    // A reader that has stopped in the middle of its answer costs nobody anything.
    let path = format!("/api/connectors/processes/{}/output?since=0&wait_ms=5000&max_bytes={}", big.id, 8 * MIB);
    let _stopped = rig.caller.open("GET", &path, "").await;

    let mut hasher = Sha256::new();
    let mut read = 0;
    let last = big
        .follow(8 * MIB, |page| {
            assert!(page["lost"].is_null(), "{}", page["lost"]);
            for chunk in page["chunks"].as_array().unwrap() {
                assert_eq!(chunk["offset"], read);
                let bytes = bytes_of(chunk);
                read += bytes.len();
                hasher.update(&bytes);
            }
            allow(read);
        })
        .await;
    let seconds = started.elapsed().as_secs_f64();
    let digest = |hasher: Sha256| hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    let mut whole = Sha256::new();
    (0..pieces).for_each(|number| whole.update(piece(number, &block)));
    let whole = digest(whole);
    assert_eq!(read, total);
    assert_eq!(digest(hasher), whole);
    let stdout = &last["exit"]["streams"]["stdout"];
    assert_eq!((&stdout["sha256"], &stdout["bytes"], &stdout["exact"]), (&json!(whole), &json!(total), &json!(true)));

    // Afterwards: what is gone is named, and the rest is exact.
    let (mut at, mut kept) = (None, 0);
    big.follow(8 * MIB, |page| {
        let resume = page["lost"]["resume_offsets"]["stdout"].as_u64();
        let at = at.get_or_insert_with(|| resume.expect("the oldest bytes are gone") as usize);
        for chunk in page["chunks"].as_array().unwrap() {
            let bytes = bytes_of(chunk);
            assert_eq!(chunk["offset"], *at + kept);
            let mut checked = 0;
            while checked < bytes.len() {
                let (number, within) =
                    ((*at + kept + checked) / (block.len() + 8), (*at + kept + checked) % (block.len() + 8));
                let length = if within < 8 { 8 - within } else { block.len() + 8 - within }.min(bytes.len() - checked);
                let expected: &[u8] = &if within < 8 { format!("{number:08}").into_bytes() } else { Vec::new() };
                let expected = if within < 8 { &expected[within..][..length] } else { &block[within - 8..][..length] };
                assert!(bytes[checked..][..length] == *expected, "at {}", *at + kept + checked);
                checked += length;
            }
            kept += bytes.len();
        }
    })
    .await;
    let at = at.unwrap();
    assert_eq!(at + kept, total);
    assert_eq!(stdout["lost_bytes"], at);
    assert!(kept > quota / 4 * 3 && kept <= quota, "{kept}");
    let resident = rig.resident_mib();
    println!(
        "{} MiB in {seconds:.1} s, {:.0} MiB/s; newest {} MiB kept; daemon resident {resident} MiB at most",
        total / MIB,
        total as f64 / MIB as f64 / seconds,
        kept / MIB
    );
    // The tail (1 MiB), two pages under way with their JSON, a batch, and what the allocator keeps.
    assert!(resident < 160, "{resident} MiB");
}

#[tokio::test(flavor = "multi_thread")]
async fn one_start_key_is_one_process_when_the_gateway_is_killed_meanwhile() {
    let mut rig = Rig::start().await;
    let caller = rig.caller.clone();
    let arguments = json!({ "command": "echo x >> starts; exec sleep 600", "key": "k" });
    let starts: Vec<_> = (0..20)
        .map(|_| {
            let (caller, arguments) = (caller.clone(), arguments.clone());
            let path = "/api/connectors/envs/box/tool/call";
            let body = json!({ "tool": "exec_command", "arguments": arguments }).to_string();
            tokio::spawn(async move { caller.try_send("POST", path, &[], body).await.is_ok() })
        })
        .collect();
    eventually("the process has started", async || rig.file("starts").exists().then_some(())).await;
    rig.kill_and_restart().await;
    for start in starts {
        let _ = start.await.unwrap();
    }
    let first = start(&caller, arguments.clone()).await;
    let again = start(&caller, arguments).await;
    assert_eq!(first.id, again.id);
    assert_eq!(std::fs::read_to_string(rig.file("starts")).unwrap(), "x\n");
    assert_eq!(first.get("").await["state"], "running");
    assert_eq!(first.post("terminate", json!({})).await.json()["exit_code"], 137);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_whose_executor_was_restarted_is_lost_and_says_so() {
    let bench = Workbench::start().await;
    let marker = Marker::new();
    let session = start(&bench.caller, json!({ "command": format!("echo begun; sleep {marker}") })).await;
    session.prints("begun").await;
    bench.executor.kill();
    let _successor = CodexExecutor::start(&bench.gateway.url(), &bench.credentials).await;
    let shown = session.becomes("lost").await;
    assert_eq!(shown["detail"], "the executor no longer has the process");
    let page = session.get("/output?since=0").await;
    assert_eq!((&page["exit_code"], &page["session_alive"]), (&Value::Null, &json!(false)));
    assert_eq!(bytes_of(&page["chunks"][0]), b"begun\n");
    let late = session.post("stdin", json!({ "data_b64": "eA==" })).await;
    assert_eq!((late.status.as_u16(), late.code().as_str()), (409, "stdin_closed"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_whose_executor_stays_away_is_lost_after_the_retention() {
    let bench = Workbench::with(|config| config.session.retention_secs = 2).await;
    let marker = Marker::new();
    let session = start(&bench.caller, json!({ "command": ["sleep", marker.to_string()] })).await;
    bench.executor.kill();
    assert_eq!(session.becomes("lost").await["detail"], "the executor was not reached again");
    assert_eq!(session.get("/output").await["state"], "lost");
    eventually("its task is over", async || bench.gateway.gateway.api().sessions.tasks.is_empty().then_some(())).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_start_whose_answer_was_lost_is_settled_by_asking_again() {
    let gateway = TestGateway::start().await;
    let caller = gateway.caller("w").await;
    let credentials = gateway.executor("w", "box").await;
    let (executor, link) = FakeExecutor::connected(&gateway, &credentials).await;
    executor.on("process/start", Reply::Hangup);
    let starting = {
        let caller = caller.clone();
        tokio::spawn(async move { caller.result("box", "exec_command", json!({ "command": "true" })).await })
    };
    link.ended().await;
    executor.on("process/start", Reply::Usual);
    let _link = executor.register_and_dial().await;
    assert_eq!(starting.await.unwrap()["isError"], false);
    assert_eq!(executor.asked("process/start"), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_start_whose_answer_never_comes_is_told_as_unknown() {
    let gateway = TestGateway::with(|config| config.session.retention_secs = 1).await;
    let caller = gateway.caller("w").await;
    let credentials = gateway.executor("w", "box").await;
    let (executor, _link) = FakeExecutor::connected(&gateway, &credentials).await;
    executor.on("process/start", Reply::Hangup);
    let answer = caller.tool("box", "exec_command", json!({ "command": "true", "key": "k" })).await;
    assert_eq!((answer.status.as_u16(), answer.code().as_str()), (502, "executor_unreachable"));
    assert_eq!(answer.json()["error"]["ran"], "unknown");
}

/// What a session leaves behind: its entry, its row, its directory, its task.
async fn nothing_is_left(gateway: &TestGateway, marker: &Marker) {
    let api = gateway.gateway.api();
    marker.is_on(0).await;
    eventually("the tasks are over", async || api.sessions.tasks.is_empty().then_some(())).await;
    assert!(api.sessions.is_empty());
    assert_eq!(api.corridor.store.sessions().await.unwrap(), []);
    let left: Vec<_> = std::fs::read_dir(gateway.state.path().join("sessions")).unwrap().flatten().collect();
    assert!(left.is_empty(), "{left:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_idle_session_leaves_nothing_behind_and_one_that_prints_is_not_idle() {
    let bench = Workbench::with(|config| {
        config.session.idle_secs = 1;
        config.session.running_idle_secs = 2;
    })
    .await;
    let (marker, markers) = (Marker::new(), Marker::new());
    let chatter = format!("while :; do echo x; sleep 0.1; : {markers}; done");
    let printing = start(&bench.caller, json!({ "command": chatter })).await;
    printing.prints("x").await;
    let silent = format!("setsid sleep {marker} & echo begun; exec sleep {marker}");
    let silent = start(&bench.caller, json!({ "command": silent })).await;
    silent.prints("begun").await;
    start(&bench.caller, json!({ "command": "true" })).await;
    let api = bench.gateway.gateway.api();
    eventually("the idle ones are forgotten", async || {
        api.sessions.expire().await;
        (api.sessions.len() == 1).then_some(())
    })
    .await;
    marker.is_on(0).await;
    assert_eq!(api.sessions.tasks.len(), 1);

    let path = format!("/api/connectors/processes/{}", printing.id);
    assert_eq!(bench.caller.send("DELETE", &path, &[], "").await.status, 200);
    nothing_is_left(&bench.gateway, &markers).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_forgotten_while_its_executor_is_away_leaves_nothing_behind() {
    let bench = Workbench::with(|config| config.session.wait_max_secs = 1).await;
    let marker = Marker::new();
    // Without stdin there is no stub around the command, whose arguments would carry the marker a second time.
    let command = json!({ "command": ["sleep", marker.to_string()], "stdin": "none" });
    let session = start(&bench.caller, command).await;
    marker.is_on(1).await;
    bench.executor.kill();
    let path = format!("/api/connectors/processes/{}", session.id);
    assert_eq!(bench.caller.send("DELETE", &path, &[], "").await.status, 200);
    let api = bench.gateway.gateway.api();
    eventually("its task is over", async || api.sessions.tasks.is_empty().then_some(())).await;
    assert!(api.sessions.is_empty());
    assert!(std::fs::read_dir(bench.gateway.state.path().join("sessions")).unwrap().next().is_none());
}

/// A disk of its own that is soon full.
struct TinyDisk(PathBuf);

impl TinyDisk {
    /// `None` where mounting is not allowed.
    fn mount(path: &Path, bytes: usize) -> Option<Self> {
        std::fs::create_dir_all(path).unwrap();
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", &format!("size={bytes}"), "tmpfs"]).arg(path);
        let mounted = mount.output().is_ok_and(|output| output.status.success());
        mounted.then(|| Self(path.to_owned()))
    }
}

impl Drop for TinyDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_on_a_full_disk_goes_on_in_memory_and_names_what_it_loses() {
    let state = Arc::new(Scratch::new());
    let Some(_disk) = TinyDisk::mount(&state.path().join("sessions"), 4 * MIB) else {
        println!("skipped: mounting a small disk takes root");
        return;
    };
    let gateway = TestGateway::on(state.clone(), |_: &mut Config| {}).await;
    let caller = gateway.caller("w").await;
    let credentials = gateway.executor("w", "box").await;
    let executor = CodexExecutor::connected(&gateway.url(), &credentials, &caller, "box").await;
    let bytes = noise(11, 16 * MIB);
    std::fs::write(executor.home().join("block"), &bytes).unwrap();
    let neighbour = start(&caller, json!({ "command": "echo one; read line; echo two" })).await;
    neighbour.prints("one").await;

    let big = start(&caller, json!({ "command": "cat block", "stdin": "none" })).await;
    assert_eq!(big.becomes("exited").await["exit_code"], 0);

    let (mut at, mut named) = (0, 0);
    let last = big
        .follow(8 * MIB, |page| {
            if let Some(resume) = page["lost"]["resume_offsets"]["stdout"].as_u64() {
                named += resume as usize - at;
                at = resume as usize;
            }
            for chunk in page["chunks"].as_array().unwrap() {
                let part = bytes_of(chunk);
                assert_eq!(chunk["offset"], at);
                assert!(part == bytes[at..][..part.len()], "at {at}");
                at += part.len();
            }
        })
        .await;
    assert_eq!(at, bytes.len());
    let stdout = &last["exit"]["streams"]["stdout"];
    assert_eq!((&stdout["lost_bytes"], &stdout["sha256"]), (&json!(named), &json!(sha256(&bytes))));
    assert!(named > 0 && named < bytes.len(), "{named}");
    println!("disk of 4 MiB: {} bytes kept, {named} named as lost", bytes.len() - named);
    neighbour.post("stdin", json!({ "data_b64": STANDARD.encode("\n") })).await;
    neighbour.prints("two").await;
    assert_eq!(caller.shell("box", json!({ "command": ["echo", "alive"] })).await["stdout"], "alive\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_is_started_on_a_full_disk_and_taken_up_by_the_next_gateway() {
    let state = Scratch::new();
    let Some(_disk) = TinyDisk::mount(&state.path().join("sessions"), MIB) else {
        println!("skipped: mounting a small disk takes root");
        return;
    };
    let filler = state.path().join("sessions").join("filler");
    let mut rig = Rig::on(state, &[]).await;
    let full = std::fs::write(&filler, vec![0; 2 * MIB]).unwrap_err();
    assert_eq!(full.kind(), std::io::ErrorKind::StorageFull);
    let caller = rig.caller.clone();
    let bytes = noise(13, 3 * MIB);
    std::fs::write(rig.file("block"), &bytes).unwrap();
    // What was shown of `big` is more than the executor keeps, of `small` it is less.
    let big = start(&caller, json!({ "command": "cat block; read line; echo end" })).await;
    let small = start(&caller, json!({ "command": "echo one; read line; echo two" })).await;
    let over = start(&caller, json!({ "command": "echo gone" })).await;
    eventually("all of it is shown", async || (big.get("").await["stdout_bytes"] == bytes.len()).then_some(())).await;
    small.prints("one").await;
    over.becomes("exited").await;
    assert_eq!(over.read_all().await.stdout, b"gone\n");
    let seen = big.follow_running().await;

    rig.kill_and_restart().await;
    // Who has read all of it goes on where it stood, and who comes late is told what is missing.
    big.post("stdin", json!({ "data_b64": STANDARD.encode("\n") })).await;
    let page = big.get(&format!("/output?since={seen}&wait_ms=25000")).await;
    assert_eq!((page["chunks"][0]["seq"].as_u64(), bytes_of(&page["chunks"][0])), (Some(seen + 1), b"end\n".to_vec()));
    let (mut kept, mut named) = (Vec::new(), 0);
    let last = big
        .follow(8 * MIB, |page| {
            let hole = |end: &str| page["lost"][end].as_u64().unwrap_or(0);
            named += hole("to_seq") - hole("from_seq");
            for chunk in page["chunks"].as_array().unwrap() {
                named += chunk["gap"]["chunks"].as_u64().unwrap_or(0);
                kept.extend(bytes_of(chunk));
            }
        })
        .await;
    let printed = [&bytes[..], b"end\n"].concat();
    assert!(kept.len() >= MIB / 2 && printed.ends_with(&kept), "{} bytes", kept.len());
    // A chunk is at most 8 KiB, so as many as are named were needed for what is missing.
    assert!(named as usize * 8192 >= printed.len() - kept.len(), "{named} chunks");
    assert_eq!(last["exit"]["streams"]["stdout"]["exact"], false);
    println!("3 MiB, killed on a full disk: {} bytes kept, {named} chunks named as lost", kept.len());

    small.post("stdin", json!({ "data_b64": STANDARD.encode("\n") })).await;
    assert_eq!(small.read_all().await.stdout, b"one\ntwo\n");
    let page = over.get("/output").await;
    assert_eq!((&page["exit_code"], &page["chunks"][0]["gap"]["bytes"]), (&json!(0), &Value::Null));
    assert_eq!(page["exit"]["streams"]["stdout"]["exact"], false);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_process_is_asked_to_end_as_the_caller_says() {
    let bench = Workbench::start().await;
    let polite = "trap 'echo got; exit 3' INT; echo ready; while :; do sleep 0.05; done";
    let stubborn = "trap '' INT; echo ready; while :; do sleep 0.05; done";
    for (command, body, exit_code, printed) in [
        (polite, json!({ "signal": "INT" }), 3, "ready\ngot\n"),
        (polite, json!({ "signal": "TERM", "grace_ms": 20_000 }), 3, "ready\ngot\n"),
        (stubborn, json!({ "signal": "TERM", "grace_ms": 200 }), 137, "ready\n"),
        (polite, json!({ "signal": "KILL" }), 137, "ready\n"),
        (polite, json!({}), 137, "ready\n"),
    ] {
        let session = start(&bench.caller, json!({ "command": ["/bin/bash", "-c", command], "stdin": "none" })).await;
        session.prints("ready").await;
        assert_eq!(session.post("terminate", body.clone()).await.status, 200);
        let shown = session.becomes("exited").await;
        assert_eq!(shown["exit_code"], exit_code, "{body}");
        assert_eq!(session.post("terminate", body).await.json()["exit_code"], exit_code, "again");
        assert_eq!(session.read_all().await.stdout, printed.as_bytes());
    }
    let ignored = start(&bench.caller, json!({ "command": ["/bin/bash", "-c", stubborn], "stdin": "none" })).await;
    ignored.prints("ready").await;
    assert_eq!(ignored.post("terminate", json!({ "signal": "INT" })).await.json()["state"], "running");
    assert_eq!(ignored.post("terminate", json!({})).await.json()["exit_code"], 137);
    let unknown = ignored.post("terminate", json!({ "signal": "HUP" })).await;
    assert_eq!((unknown.status.as_u16(), unknown.code().as_str()), (400, "bad_request"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_timeout_ends_the_process_and_all_it_started() {
    let bench = Workbench::start().await;
    let marker = Marker::new();
    let command = format!("setsid sleep {marker} & sleep {marker}");
    let session = start(&bench.caller, json!({ "command": command, "timeout_ms": 500 })).await;
    let shown = session.becomes("exited").await;
    assert_eq!((&shown["exit_code"], &shown["detail"]), (&json!(137), &json!("timed out")));
    marker.is_on(0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn unbinding_ends_the_sessions_of_that_workspace() {
    let bench = Workbench::start().await;
    let executor = ExecutorId::new(&bench.credentials.executor).unwrap();
    withdrawing_ends_sessions(&bench, Request::ExecutorUnbind { executor, workspace: WorkspaceId::new("w").unwrap() })
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn revoking_a_workspace_ends_its_sessions() {
    let bench = Workbench::start().await;
    withdrawing_ends_sessions(&bench, Request::RevokeWorkspace { workspace: WorkspaceId::new("w").unwrap() }).await;
}

async fn withdrawing_ends_sessions(bench: &Workbench, request: Request) {
    let marker = Marker::new();
    let command = format!("setsid sleep {marker} & echo begun; exec sleep {marker}");
    let session = start(&bench.caller, json!({ "command": command })).await;
    session.prints("begun").await;
    bench.gateway.admin(request).await;
    marker.is_on(0).await;
    let sessions = &bench.gateway.gateway.api().sessions;
    let session = sessions.of(&WorkspaceId::new("w").unwrap()).remove(0);
    eventually("the session is over", async || session.status().state.is_final().then_some(())).await;
    let detail = session.status().detail;
    assert_eq!(detail.as_deref(), Some("the environment was taken from the workspace"));
    eventually("its tasks are over", async || sessions.tasks.is_empty().then_some(())).await;
}
