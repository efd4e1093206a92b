//! Files over plain HTTP on the real executor: `GET`, `HEAD` and `PUT …/envs/{name}/files?path=`.

use std::os::unix::fs::PermissionsExt;

use exec_gateway::admin::{Request, Response};
use exec_gateway::config::Config;
use http_body_util::BodyExt;
use hyper::body::Incoming;
use serde_json::json;
use sha2::{Digest, Sha256};

use crate::support::{Answer, Caller, MIB, Machine, Pieces, TestGateway, eventually, noise};

/// A caller and an executor under the name `box`.
struct Shelf {
    caller: Caller,
    machine: Machine,
    gateway: TestGateway,
}

impl Shelf {
    async fn start() -> Self {
        Self::with(|_| {}).await
    }

    async fn with(change: impl FnOnce(&mut Config)) -> Self {
        let gateway = TestGateway::with(change).await;
        let caller = gateway.caller("w").await;
        let credentials = gateway.executor("w", "box").await;
        let machine = Machine::connected(gateway.address(), &credentials, &caller, "box").await;
        Self { caller, machine, gateway }
    }

    fn put_file(&self, name: &str, content: &[u8]) {
        std::fs::write(self.machine.file(name), content).unwrap();
    }

    async fn get(&self, name: &str, headers: &[(&str, &str)]) -> Answer {
        self.caller.send("GET", &at(name), headers, "").await
    }

    async fn put(&self, name: &str, headers: &[(&str, &str)], content: &[u8]) -> Answer {
        self.caller.send("PUT", &at(name), headers, content.to_vec()).await
    }

    /// A `PUT` whose content comes in pieces.
    async fn pieces(&self, name: &str, length: Option<u64>) -> Pieces {
        let bearer = format!("Bearer {}", self.caller.token.as_ref().unwrap());
        Pieces::send(self.caller.address, "PUT", &at(name), &[("authorization", &bearer)], length).await
    }

    /// Waits until something is staged.
    async fn is_staging(&self) {
        eventually("a content is staged", async || (!self.machine.leftovers().is_empty()).then_some(())).await;
    }
}

fn at(name: &str) -> String {
    format!("/api/connectors/envs/box/files?path={name}")
}

fn sha256(content: &[u8]) -> String {
    format!("{:x}", Sha256::digest(content))
}

#[track_caller]
fn refusal(answer: &Answer) -> (u16, String) {
    (answer.status.as_u16(), answer.code())
}

/// Reads on until so many bytes are there.
async fn first(body: &mut Incoming, bytes: usize) -> Vec<u8> {
    let mut read = Vec::new();
    while read.len() < bytes {
        read.extend_from_slice(&body.frame().await.unwrap().unwrap().into_data().unwrap());
    }
    read
}

#[tokio::test(flavor = "multi_thread")]
async fn a_large_file_goes_up_and_down_whole() {
    let shelf = Shelf::start().await;
    let content = noise(1, 20 * MIB + 123);

    let put = shelf.put("deep/large%20file&create_parents=true&mode=640", &[], &content).await;
    assert_eq!(put.status, 201, "{put:?}");
    let told = json!({ "bytes": content.len(), "sha256": sha256(&content), "atomic": true, "created": true });
    assert_eq!(put.json(), told);
    let file = shelf.machine.file("deep/large file");
    assert!(std::fs::read(&file).unwrap() == content, "the file differs from what was sent");
    assert_eq!(file.metadata().unwrap().permissions().mode() & 0o7777, 0o640);
    assert_eq!(std::fs::read_dir(shelf.machine.file("deep")).unwrap().count(), 1, "nothing else is left");

    let got = shelf.get("deep/large%20file", &[]).await;
    assert!(got.status == 200 && got.body == content, "what came down differs from the file");
    assert_eq!(got.header("content-length"), Some(content.len().to_string().as_str()));
    assert_eq!(got.header("content-type"), Some("application/octet-stream"));
    assert_eq!(got.header("etag"), put.header("etag"));

    let again = shelf.put("deep/large%20file", &[], b"short").await;
    assert_eq!((again.status.as_u16(), again.json()["created"].clone()), (200, json!(false)));
    assert_eq!(std::fs::read(&file).unwrap(), b"short");
    assert_eq!(file.metadata().unwrap().permissions().mode() & 0o7777, 0o640, "the mode is kept");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_part_is_read_by_its_range_while_the_file_is_the_same() {
    let shelf = Shelf::start().await;
    let content = noise(2, 3 * MIB + 7);
    shelf.put_file("file", &content);
    let part = async |range: &str, tag: Option<&str>| {
        let tag = tag.map(|tag| ("if-range", tag));
        let headers: Vec<_> = [("range", range)].into_iter().chain(tag).collect();
        shelf.get("file", &headers).await
    };
    let total = content.len();

    for (range, from, to) in
        [("bytes=5-9", 5, 10), ("bytes=1048570-2097160", MIB - 6, 2 * MIB + 9), ("bytes=-3", total - 3, total)]
    {
        let answer = part(range, None).await;
        assert!(answer.status == 206 && answer.body == content[from..to], "{range}");
        assert_eq!(answer.header("content-range"), Some(format!("bytes {from}-{}/{total}", to - 1).as_str()));
    }
    let beyond = part(&format!("bytes={total}-"), None).await;
    assert_eq!(refusal(&beyond), (416, "range_not_satisfiable".into()));
    assert_eq!(beyond.header("content-range"), Some(format!("bytes */{total}").as_str()));
    assert_eq!(part("bytes=0-1,4-5", None).await.status, 200, "several ranges are passed over");

    let tag = shelf.caller.send("HEAD", &at("file"), &[], "").await;
    assert_eq!((tag.header("content-length"), &tag.body[..]), (Some(total.to_string().as_str()), &b""[..]));
    let tag = tag.header("etag").unwrap();
    assert_eq!(part("bytes=5-9", Some(tag)).await.status, 206);
    assert_eq!(part("bytes=5-9", Some("\"another\"")).await.status, 200);
    let known = shelf.get("file", &[("if-none-match", tag)]).await;
    assert_eq!((known.status.as_u16(), &known.body[..]), (304, &b""[..]));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_read_or_written_is_said_before_the_first_byte() {
    let shelf = Shelf::start().await;
    std::fs::create_dir(shelf.machine.file("directory")).unwrap();
    shelf.put_file("file", b"content");
    let pipe = std::process::Command::new("mkfifo").arg(shelf.machine.file("pipe")).status().unwrap();
    assert!(pipe.success());
    for (name, status, code) in [
        ("missing", 404, "file_not_found"),
        ("directory", 409, "is_a_directory"),
        ("pipe", 409, "not_a_file"),
        ("", 400, "bad_arguments"),
        ("a%00b", 400, "bad_arguments"),
    ] {
        assert_eq!(refusal(&shelf.get(name, &[]).await), (status, code.into()), "{name}");
        if name != "missing" {
            assert_eq!(refusal(&shelf.put(name, &[], b"x").await), (status, code.into()), "{name}");
        }
    }
    assert_eq!(refusal(&shelf.put("no/directory", &[], b"x").await), (404, "file_not_found".into()));
    let unnamed = shelf.caller.send("GET", "/api/connectors/envs/box/files", &[], "").await;
    assert_eq!(refusal(&unnamed), (400, "bad_arguments".into()));
    let nowhere = shelf.caller.send("GET", "/api/sdk/envs/other/files?path=file", &[], "").await;
    assert_eq!(refusal(&nowhere), (404, "env_not_found".into()));
    let stranger = shelf.gateway.stranger().send("GET", &at("file"), &[], "").await;
    assert_eq!(refusal(&stranger), (401, "missing_bearer".into()));
    let empty = shelf.put("empty", &[], b"").await;
    assert_eq!((empty.status.as_u16(), empty.json()["bytes"].clone()), (201, json!(0)));
    assert_eq!(&shelf.get("empty", &[]).await.body[..], b"");
    let proc = shelf.get("/proc/version", &[]).await;
    assert_eq!(&proc.body[..], std::fs::read("/proc/version").unwrap(), "a file that tells no size");
    shelf.machine.is_clean().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_content_is_put_only_where_what_was_expected_is() {
    let shelf = Shelf::start().await;
    let put = async |header: (&str, &str), content: &[u8]| shelf.put("file", &[header], content).await;
    assert_eq!(refusal(&put(("if-match", "*"), b"1").await), (404, "file_not_found".into()));
    assert_eq!(put(("if-none-match", "*"), b"1").await.status, 201);
    assert_eq!(refusal(&put(("if-none-match", "*"), b"2").await), (412, "exists".into()));

    let hash = format!("\"{}\"", sha256(b"1"));
    assert_eq!(put(("if-match", &hash), b"22").await.status, 200);
    assert_eq!(refusal(&put(("if-match", &hash), b"3").await), (412, "changed".into()));
    let tag = shelf.get("file", &[]).await.header("etag").unwrap().to_owned();
    let new = put(("if-match", &tag), b"333").await;
    assert_eq!(new.status, 200);
    assert_eq!(refusal(&put(("if-match", &tag), b"4").await), (412, "changed".into()));
    assert_eq!(put(("if-match", new.header("etag").unwrap()), b"4444").await.status, 200);
    assert_eq!(refusal(&put(("if-match", "W/\"x\""), b"5").await), (400, "bad_request".into()));
    assert_eq!(std::fs::read(shelf.machine.file("file")).unwrap(), b"4444");
    shelf.machine.is_clean().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_link_that_is_cut_in_the_middle_is_not_noticed() {
    let shelf = Shelf::start().await;
    let content = noise(3, 70 * MIB + 9);

    let put = shelf.pieces("file", None).await;
    for (nth, piece) in content.chunks(MIB).enumerate() {
        put.piece(piece.to_vec()).await.unwrap();
        // Executors take longer to come back with each cut.
        if nth == 3 {
            shelf.machine.proxy.cut();
        }
    }
    put.end().await;
    let answer = put.answer().await.unwrap();
    assert_eq!((answer.status.as_u16(), answer.json()["sha256"].clone()), (201, json!(sha256(&content))));
    assert!(std::fs::read(shelf.machine.file("file")).unwrap() == content, "the file differs from what was sent");
    shelf.machine.is_clean().await;

    let mut body = shelf.caller.open("GET", &at("file"), "").await.into_body();
    let mut received = first(&mut body, 10 * MIB).await;
    shelf.machine.proxy.cut();
    received.extend(body.collect().await.unwrap().to_bytes());
    assert!(received == content, "what came down differs from the file");
    assert!(shelf.machine.proxy.cuts() == 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_changes_while_it_is_read_breaks_the_answer_off() {
    let shelf = Shelf::start().await;
    let content = noise(4, 40 * MIB);
    for cut in [false, true] {
        shelf.put_file("file", &content);
        let mut body = shelf.caller.open("GET", &at("file"), "").await.into_body();
        first(&mut body, MIB).await;
        // The same size: only its time tells.
        shelf.put_file("file", &noise(5, 40 * MIB));
        if cut {
            shelf.machine.proxy.cut();
        }
        assert!(body.collect().await.is_err(), "cut: {cut}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_caller_that_leaves_half_way_leaves_nothing_behind() {
    let shelf = Shelf::with(|config| {
        config.transfer.stall_secs = 1;
        config.tools.upload_bytes_max = 8 * MIB as u64;
    })
    .await;
    shelf.put_file("file", b"former");
    let put = shelf.pieces("file", Some(5 * MIB as u64)).await;
    put.piece(noise(6, 3 * MIB)).await.unwrap();
    shelf.is_staging().await;
    drop(put);
    shelf.machine.is_clean().await;

    let put = shelf.pieces("file", None).await;
    put.piece(noise(6, 3 * MIB)).await.unwrap();
    assert_eq!(refusal(&put.answer().await.unwrap()), (408, "body_timeout".into()), "it sends nothing more");
    shelf.machine.is_clean().await;

    let announced = shelf.pieces("file", Some(8 * MIB as u64 + 1)).await;
    assert_eq!(refusal(&announced.answer().await.unwrap()), (413, "body_too_large".into()));
    let put = shelf.pieces("file", None).await;
    put.piece(noise(6, 8 * MIB)).await.unwrap();
    shelf.is_staging().await;
    put.piece(b"x".to_vec()).await.unwrap();
    assert_eq!(refusal(&put.answer().await.unwrap()), (413, "body_too_large".into()));
    shelf.machine.is_clean().await;
    assert_eq!(std::fs::read(shelf.machine.file("file")).unwrap(), b"former");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_read_only_token_reads_files_and_writes_none() {
    let shelf = Shelf::start().await;
    shelf.put_file("file", b"content");
    let order = Request::TokenCreate { workspace: "w".parse().unwrap(), user: None, ttl: None, read_only: true };
    let Response::Token { token, .. } = shelf.gateway.admin(order).await else { panic!("no token") };
    let reader = Caller::new(shelf.caller.address, Some(token.expose().to_owned()));
    assert_eq!(&reader.send("GET", &at("file"), &[], "").await.body[..], b"content");
    assert_eq!(refusal(&reader.send("PUT", &at("file"), &[], "x").await), (403, "forbidden".into()));
}
