//! `read_file` and `write_file` on the real executor.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};

use crate::support::{MIB, Workbench, noise};

impl Workbench {
    /// The result of reading a file that can be read, decoded.
    async fn read(&self, arguments: Value) -> Vec<u8> {
        let result = self.caller.result("box", "read_file", arguments).await;
        assert_eq!(result["isError"], false, "{result}");
        STANDARD.decode(result["content"][0]["text"].as_str().unwrap()).unwrap()
    }

    async fn write(&self, path: &str, content: &[u8]) {
        let arguments = json!({ "path": path, "content_b64": STANDARD.encode(content) });
        let result = self.caller.result("box", "write_file", arguments).await;
        assert_eq!((&result["content"][0]["text"], &result["isError"]), (&json!("ok"), &json!(false)), "{result}");
    }

    /// The code with which a tool fails.
    async fn failure(&self, tool: &str, arguments: Value) -> String {
        let result = self.caller.result("box", tool, arguments).await;
        assert_eq!(result["isError"], true, "{result}");
        result["structuredContent"]["code"].as_str().unwrap().to_owned()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn twenty_mib_are_written_and_read_exactly() {
    let bench = Workbench::start().await;
    // Not a whole number of blocks.
    let bytes = noise(20, 20 * MIB + 17);

    bench.write("large", &bytes).await;

    assert!(std::fs::read(bench.file("large")).unwrap() == bytes, "the file differs from what was written");
    assert!(bench.read(json!({ "path": "large" })).await == bytes, "what was read differs from the file");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slice_is_read_by_offset_and_limit() {
    let bench = Workbench::start().await;
    let bytes = noise(3, 3 * MIB);
    std::fs::write(bench.file("file"), &bytes).unwrap();
    let slice =
        async |offset: i64, limit: u64| bench.read(json!({ "path": "file", "offset": offset, "limit": limit })).await;

    let from = MIB - 5;
    assert!(slice(from as i64, MIB as u64 + 10).await == bytes[from..from + MIB + 10], "over two borders of blocks");
    assert_eq!(slice(2, 3).await, bytes[2..5]);
    assert_eq!(slice(bytes.len() as i64 - 4, 100).await, bytes[bytes.len() - 4..]);
    assert!(slice(MIB as i64, 0).await == bytes[MIB..], "a limit of 0 is no limit");
    assert_eq!(slice(-7, 3).await, bytes[..3], "a negative offset is the beginning");
    assert_eq!(slice(bytes.len() as i64, 10).await, b"");
    assert_eq!(slice(i64::MAX, 10).await, b"", "far beyond the end");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_empty_file_is_written_and_read() {
    let bench = Workbench::start().await;

    bench.write("empty", b"").await;
    assert_eq!(std::fs::read(bench.file("empty")).unwrap(), b"");
    assert_eq!(bench.read(json!({ "path": "empty" })).await, b"");

    bench.caller.result("box", "write_file", json!({ "path": "left-out" })).await;
    assert_eq!(std::fs::read(bench.file("left-out")).unwrap(), b"", "no content is an empty file");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shorter_content_leaves_nothing_of_the_former_file() {
    let bench = Workbench::start().await;
    // Long ones are written in blocks, short ones at once.
    for content in [noise(1, 3 * MIB), noise(2, 2 * MIB + 1), b"short".to_vec(), b"".to_vec()] {
        bench.write("file", &content).await;

        assert!(std::fs::read(bench.file("file")).unwrap() == content, "not the {} bytes written", content.len());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn paths_are_taken_on_the_executor() {
    let bench = Workbench::of(
        |_| {},
        |command, home| {
            std::fs::create_dir(home.join("work")).unwrap();
            command.current_dir(home.join("work"));
        },
    )
    .await;

    bench.write("a file", b"relative").await;
    bench.write("~/100% ü?#", b"at home").await;
    let absolute = bench.file("work/../absolute").display().to_string();
    bench.write(&absolute, b"absolute").await;

    assert_eq!(std::fs::read(bench.file("work/a file")).unwrap(), b"relative");
    assert_eq!(std::fs::read(bench.file("100% ü?#")).unwrap(), b"at home");
    assert_eq!(bench.read(json!({ "path": "~/work/a file" })).await, b"relative");
    assert_eq!(bench.read(json!({ "path": "../100% ü?#" })).await, b"at home");
    assert_eq!(bench.read(json!({ "path": "../absolute" })).await, b"absolute");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_missing_is_not_found_until_its_directories_are_made() {
    let bench = Workbench::start().await;
    let deep = json!({ "path": "a/b/c", "content_b64": "aGk=" });

    assert_eq!(bench.failure("read_file", json!({ "path": "a/b/c" })).await, "not_found");
    assert_eq!(bench.failure("write_file", deep.clone()).await, "not_found");
    assert!(!bench.file("a").exists(), "directories are made only when asked for");

    let mut deep = deep;
    deep["create_parents"] = json!(true);
    bench.caller.result("box", "write_file", deep).await;
    assert_eq!(std::fs::read(bench.file("a/b/c")).unwrap(), b"hi");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_a_file_is_refused_and_holds_up_nobody() {
    let bench = Workbench::start().await;
    std::fs::create_dir(bench.file("directory")).unwrap();
    std::fs::write(bench.file("file"), b"content").unwrap();
    let pipe = std::process::Command::new("mkfifo").arg(bench.file("pipe")).status().unwrap();
    assert!(pipe.success());

    for (path, code) in [("directory", "is_a_directory"), ("pipe", "not_a_file")] {
        assert_eq!(bench.failure("read_file", json!({ "path": path })).await, code, "{path}");
        for content in [b"short".to_vec(), noise(0, MIB + 1)] {
            let arguments = json!({ "path": path, "content_b64": STANDARD.encode(content) });
            assert_eq!(bench.failure("write_file", arguments).await, code, "{path}");
        }
    }
    assert_eq!(bench.read(json!({ "path": "file" })).await, b"content");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_too_large_for_one_call_is_read_in_slices() {
    let bench = Workbench::with(|config| config.tools.output_bytes_max = 1000).await;
    let bytes = noise(4, 1001);
    std::fs::write(bench.file("file"), &bytes).unwrap();

    assert_eq!(bench.failure("read_file", json!({ "path": "file" })).await, "too_large");
    assert_eq!(bench.failure("read_file", json!({ "path": "file", "limit": 1001 })).await, "too_large");
    assert_eq!(bench.read(json!({ "path": "file", "limit": 1000 })).await, bytes[..1000]);
    assert_eq!(bench.read(json!({ "path": "file", "offset": 1 })).await, bytes[1..]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_tells_no_size_is_read_to_its_end() {
    let bench = Workbench::start().await;

    let version = bench.read(json!({ "path": "/proc/version" })).await;

    assert_eq!(version, std::fs::read("/proc/version").unwrap());
}

#[tokio::test(flavor = "multi_thread")]
async fn content_that_is_not_base64_is_a_bad_argument() {
    let bench = Workbench::start().await;
    for content in ["no base64!", "aGk", "aGk=\n"] {
        let answer = bench.caller.tool("box", "write_file", json!({ "path": "file", "content_b64": content })).await;

        assert_eq!((answer.status.as_u16(), answer.code().as_str()), (400, "bad_arguments"), "{content}");
        let message = answer.json()["error"]["message"].as_str().unwrap().to_owned();
        assert!(message.starts_with("content_b64: "), "{message}");
    }
    assert!(!bench.file("file").exists());
}
