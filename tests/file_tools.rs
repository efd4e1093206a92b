//! The file tools on the real executor: a table of what they do and how they fail, and what holds when files change,
//! disks are full and callers leave in the middle.

use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use exec_gateway::tools::Tool;
use serde_json::{Value, json};
use tokio::process::Command;

use crate::support::codex::{has_namespaces, in_namespaces};
use crate::support::{CodexExecutor, MIB, Marker, Proxy, TestGateway, Workbench, eventually, noise};

/// One call and what comes of it.
struct Case {
    says: &'static str,
    tool: &'static str,
    arguments: Value,
    then: Then,
}

enum Then {
    /// A success with at least these members.
    Gives(Value),
    /// A failure of this code.
    Fails(&'static str),
    /// Arguments that are refused, by the name of the field.
    Refuses(&'static str),
}

use Then::{Fails, Gives, Refuses};

fn case(says: &'static str, tool: &'static str, arguments: Value, then: Then) -> Case {
    Case { says, tool, arguments, then }
}

impl Workbench {
    async fn hold(&self, cases: Vec<Case>) {
        for Case { says, tool, arguments, then } in cases {
            let about = format!("{tool}: {says}: {arguments}");
            let answer = self.caller.tool("box", tool, arguments).await;
            let found = answer.json();
            match then {
                Refuses(field) => {
                    assert_eq!((answer.status.as_u16(), answer.code().as_str()), (400, "bad_arguments"), "{about}");
                    let message = found["error"]["message"].as_str().unwrap();
                    assert!(message.starts_with(&format!("{field}: ")), "{about}: {message}");
                }
                Fails(code) => assert_eq!(found["structuredContent"]["code"], code, "{about}: {found}"),
                Gives(expected) => {
                    assert_eq!(found["isError"], false, "{about}: {found}");
                    for (member, value) in expected.as_object().unwrap() {
                        assert_eq!(found["structuredContent"][member], *value, "{about}: {member} of {found}");
                    }
                    fits_the_schema(tool, &found["structuredContent"]);
                }
            }
        }
    }

    /// The structured part of a success.
    async fn done(&self, tool: &str, arguments: Value) -> Value {
        let result = self.caller.result("box", tool, arguments).await;
        assert_eq!(result["isError"], false, "{result}");
        result["structuredContent"].clone()
    }

    async fn text(&self, tool: &str, arguments: Value) -> String {
        let result = self.caller.result("box", tool, arguments).await;
        assert_eq!(result["isError"], false, "{result}");
        result["content"][0]["text"].as_str().unwrap().to_owned()
    }

    fn put(&self, name: &str, content: impl AsRef<[u8]>) {
        let path = self.file(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, content).unwrap();
    }

    fn content(&self, name: &str) -> String {
        std::fs::read_to_string(self.file(name)).unwrap()
    }

    fn mode(&self, name: &str) -> u32 {
        std::fs::metadata(self.file(name)).unwrap().permissions().mode() & 0o7777
    }

    /// Waits until nothing is left of what was staged.
    async fn has_nothing_staged(&self) {
        eventually("nothing staged is left", async || (!has_staged(self.executor.home())).then_some(())).await;
    }
}

fn has_staged(directory: &Path) -> bool {
    std::fs::read_dir(directory).into_iter().flatten().flatten().any(|entry| {
        let is_directory = entry.file_type().is_ok_and(|kind| kind.is_dir());
        entry.file_name().to_string_lossy().starts_with(".exec-gateway-") || is_directory && has_staged(&entry.path())
    })
}

/// Every member is in the tool's own schema, and none that it requires is missing.
fn fits_the_schema(tool: &str, output: &Value) {
    let schema = Tool::named(tool).unwrap().output_schema();
    for member in output.as_object().unwrap().keys() {
        assert!(schema["properties"].get(member).is_some(), "{tool} does not tell of {member}: {schema}");
    }
    for member in schema["required"].as_array().unwrap() {
        assert!(output.get(member.as_str().unwrap()).is_some(), "{tool} has no {member}: {output}");
    }
}

fn sha256(content: impl AsRef<[u8]>) -> String {
    use sha2::Digest;
    format!("{:x}", sha2::Sha256::digest(content))
}

/// Every tool that is told a path, with what else it has to be told.
const PATHS: &[(&str, &str, &str)] = &[
    ("read_file", "path", r#"{}"#),
    ("write_file", "path", r#"{"content":"x"}"#),
    ("edit_file", "path", r#"{"old_string":"a","new_string":"b"}"#),
    ("list_directory", "path", r#"{}"#),
    ("find_files", "path", r#"{"pattern":"*"}"#),
    ("search_files", "path", r#"{"pattern":"a"}"#),
    ("stat", "path", r#"{}"#),
    ("make_directory", "path", r#"{}"#),
    ("remove_path", "path", r#"{}"#),
    ("move_path", "source", r#"{"destination":"elsewhere"}"#),
    ("move_path", "destination", r#"{"source":"file"}"#),
];

fn with_path(rest: &str, field: &str, path: &str) -> Value {
    let mut arguments: Value = serde_json::from_str(rest).unwrap();
    arguments[field] = json!(path);
    arguments
}

#[tokio::test(flavor = "multi_thread")]
async fn every_tool_does_what_its_table_says() {
    let bench = Workbench::start().await;
    for (name, content) in [
        ("text", "one\ntwo\nthree"),
        ("crlf", "a\r\nb\r\n"),
        ("empty", ""),
        ("bytes", "\0\u{1}"),
        ("tree/a.rs", "fn one() {}\n"),
        ("tree/deep/b.rs", "fn two() {}\nlet x = one();\n"),
        ("tree/deep/c.txt", "one\n"),
        ("tree/.git/config", "one\n"),
        ("tree/.hidden/d.rs", "one\n"),
        ("old", "old"),
        ("target", "target"),
    ] {
        bench.put(name, content);
    }
    std::fs::create_dir(bench.file("void")).unwrap();
    symlink("text", bench.file("link")).unwrap();
    symlink("nowhere", bench.file("broken")).unwrap();
    symlink("round", bench.file("round")).unwrap();
    std::fs::set_permissions(bench.file("old"), PermissionsExt::from_mode(0o750)).unwrap();

    #[rustfmt::skip]
    let cases = vec![
        case("some lines", "read_file", json!({ "path": "text", "start_line": 2, "end_line": 2 }),
            Gives(json!({ "encoding": "text", "start_line": 2, "end_line": 2, "truncated": false, "size": 13 }))),
        case("all lines, the last without a break", "read_file", json!({ "path": "text", "encoding": "text" }),
            Gives(json!({ "end_line": 3, "total_lines": 3, "sha256": sha256("one\ntwo\nthree") }))),
        case("lines behind the end", "read_file", json!({ "path": "text", "start_line": 9 }),
            Gives(json!({ "start_line": 9, "end_line": 8, "total_lines": 3 }))),
        case("an empty text", "read_file", json!({ "path": "empty", "encoding": "text" }),
            Gives(json!({ "total_lines": 0, "end_line": 0, "sha256": sha256("") }))),
        case("a whole file has its hash", "read_file", json!({ "path": "bytes" }),
            Gives(json!({ "encoding": "base64", "sha256": sha256("\0\u{1}") }))),
        case("a slice has it on request", "read_file", json!({ "path": "text", "offset": 2, "limit": 1, "hash": true }),
            Gives(json!({ "sha256": sha256("one\ntwo\nthree") }))),
        case("a slice has it not by itself", "read_file", json!({ "path": "text", "limit": 1 }),
            Gives(json!({ "sha256": null }))),
        case("bytes are no text", "read_file", json!({ "path": "bytes", "encoding": "text" }), Fails("binary")),
        case("a directory", "read_file", json!({ "path": "tree" }), Fails("is_a_directory")),
        case("below a file", "read_file", json!({ "path": "text/x" }), Fails("not_a_directory")),
        case("lines are not bytes", "read_file", json!({ "path": "text", "start_line": 1, "offset": 1 }),
            Refuses("offset")),
        case("lines begin at 1", "read_file", json!({ "path": "text", "start_line": 0 }), Refuses("start_line")),
        case("the end before the start", "read_file", json!({ "path": "text", "start_line": 2, "end_line": 1 }),
            Refuses("end_line")),
        case("a new file", "write_file", json!({ "path": "new", "content": "é", "if_match": "none" }),
            Gives(json!({ "bytes": 2, "created": true, "atomic": true, "sha256": sha256("é") }))),
        case("with its directories and mode", "write_file",
            json!({ "path": "x/y/z", "content": "1", "create_parents": true, "mode": "0600" }),
            Gives(json!({ "created": true }))),
        case("an existing one", "write_file", json!({ "path": "old", "content": "2", "if_match": sha256("old") }),
            Gives(json!({ "created": false, "atomic": true }))),
        case("that has changed", "write_file", json!({ "path": "old", "content": "3", "if_match": sha256("old") }),
            Fails("changed")),
        case("that should be new", "write_file", json!({ "path": "old", "content": "3", "if_match": "none" }),
            Fails("exists")),
        case("that should be there", "write_file", json!({ "path": "none", "content": "3", "if_match": "*" }),
            Fails("not_found")),
        case("through a link", "write_file", json!({ "path": "link", "content": "by link\n" }),
            Gives(json!({ "created": false }))),
        case("through a link to nothing yet", "write_file", json!({ "path": "broken", "content": "now" }),
            Gives(json!({ "created": true }))),
        case("in a directory that is not there", "write_file", json!({ "path": "no/file" }), Fails("not_found")),
        case("below a file", "write_file", json!({ "path": "old/file", "create_parents": true }),
            Fails("not_a_directory")),
        case("two contents", "write_file", json!({ "path": "old", "content": "a", "content_b64": "YQ==" }),
            Refuses("content")),
        case("no hash", "write_file", json!({ "path": "old", "if_match": "abc" }), Refuses("if_match")),
        case("no mode", "write_file", json!({ "path": "old", "mode": "rwx" }), Refuses("mode")),
        case("one place", "edit_file", json!({ "path": "target", "old_string": "get", "new_string": "gets" }),
            Gives(json!({ "replacements": 1, "line": 1, "bytes": 7, "sha256": sha256("targets"), "atomic": true }))),
        case("not there", "edit_file", json!({ "path": "target", "old_string": "got", "new_string": "x" }),
            Fails("no_match")),
        case("twice", "edit_file", json!({ "path": "target", "old_string": "t", "new_string": "T" }),
            Fails("not_unique")),
        case("all", "edit_file", json!({ "path": "target", "old_string": "t", "new_string": "T", "replace_all": true }),
            Gives(json!({ "replacements": 2, "sha256": sha256("TargeTs") }))),
        case("line ends stay", "edit_file", json!({ "path": "crlf", "old_string": "a\nb", "new_string": "a\nc" }),
            Gives(json!({ "sha256": sha256("a\r\nc\r\n") }))),
        case("of another content", "edit_file",
            json!({ "path": "target", "old_string": "T", "new_string": "t", "if_match": sha256("target") }),
            Fails("changed")),
        case("nothing to look for", "edit_file", json!({ "path": "target", "old_string": "", "new_string": "x" }),
            Refuses("old_string")),
        case("no change", "edit_file", json!({ "path": "target", "old_string": "T", "new_string": "T" }),
            Refuses("new_string")),
        case("a file", "stat", json!({ "path": "empty" }), Gives(json!({ "kind": "file", "size": 0 }))),
        case("a mode that was kept", "stat", json!({ "path": "old" }), Gives(json!({ "mode": "0750", "size": 1 }))),
        case("a mode that was given", "stat", json!({ "path": "x/y/z" }), Gives(json!({ "mode": "0600" }))),
        case("a directory", "stat", json!({ "path": "tree" }), Gives(json!({ "kind": "directory" }))),
        case("a link", "stat", json!({ "path": "link" }),
            Gives(json!({ "kind": "file", "link_target": "text", "size": 8 }))),
        case("a link to itself", "stat", json!({ "path": "round" }),
            Gives(json!({ "kind": "symlink", "link_target": "round" }))),
        case("a device", "stat", json!({ "path": "/dev/null" }), Gives(json!({ "kind": "other" }))),
        case("patterns for names", "find_files", json!({ "path": "tree", "pattern": "*.rs" }),
            Gives(json!({ "paths": [".hidden/d.rs", "a.rs", "deep/b.rs"], "truncated": false }))),
        case("patterns for paths", "find_files", json!({ "path": "tree", "pattern": "deep/**" }),
            Gives(json!({ "paths": ["deep/b.rs", "deep/c.txt"] }))),
        case("braces", "find_files", json!({ "path": "tree", "pattern": "**/{a,c}.*" }),
            Gives(json!({ "paths": ["a.rs", "deep/c.txt"] }))),
        case("directories", "find_files", json!({ "path": "tree", "pattern": "*", "kind": "directory" }),
            Gives(json!({ "paths": [".hidden", "deep"] }))),
        case("what is left out", "find_files", json!({ "path": "tree", "pattern": "*", "exclude": [".*", "deep"] }),
            Gives(json!({ "paths": ["a.rs"] }))),
        case("nothing left out", "find_files", json!({ "path": "tree", "pattern": "config", "exclude": [] }),
            Gives(json!({ "paths": [".git/config"] }))),
        case("a bound", "find_files", json!({ "path": "tree", "pattern": "*.rs", "limit": 2 }),
            Gives(json!({ "paths": [".hidden/d.rs", "a.rs"], "truncated": true }))),
        case("a broken pattern", "find_files", json!({ "path": "tree", "pattern": "[a" }), Refuses("pattern")),
        case("in a file", "find_files", json!({ "path": "old", "pattern": "*" }), Fails("not_a_directory")),
        case("a word", "search_files", json!({ "path": "tree", "pattern": r"\bone\(", "context": 1 }),
            Gives(json!({ "truncated": false, "matches": [
                { "path": "a.rs", "line": 1, "text": "fn one() {}" },
                { "path": "deep/b.rs", "line": 2, "text": "let x = one();", "before": ["fn two() {}"] }] }))),
        case("any case, some files", "search_files",
            json!({ "path": "tree", "pattern": "^ONE$", "glob": "*.txt", "ignore_case": true }),
            Gives(json!({ "matches": [{ "path": "deep/c.txt", "line": 1, "text": "one" }] }))),
        case("no fixed text", "search_files", json!({ "path": "tree", "pattern": r"^\w{3}$", "glob": "deep/*" }),
            Gives(json!({ "matches": [{ "path": "deep/c.txt", "line": 1, "text": "one" }] }))),
        case("a bound", "search_files", json!({ "path": "tree", "pattern": "one", "limit": 1 }),
            Gives(json!({ "truncated": true, "matches": [{ "path": ".hidden/d.rs", "line": 1, "text": "one" }] }))),
        case("one file", "search_files", json!({ "path": "tree/deep/c.txt", "pattern": "n" }),
            Gives(json!({ "matches": [{ "path": "tree/deep/c.txt", "line": 1, "text": "one" }] }))),
        case("bytes", "search_files", json!({ "path": ".", "pattern": "\u{1}", "glob": "bytes" }),
            Gives(json!({ "matches": [] }))),
        case("a broken expression", "search_files", json!({ "pattern": "(" }), Refuses("pattern")),
        case("a page", "list_directory", json!({ "path": "tree", "limit": 2 }),
            Gives(json!({ "total": 4, "truncated": true, "next_cursor": ".hidden" }))),
        case("the next page", "list_directory", json!({ "path": "tree/deep", "cursor": "b.rs" }),
            Gives(json!({ "total": 2, "truncated": false }))),
        case("of nothing", "list_directory", json!({ "path": "void" }), Gives(json!({ "entries": [], "total": 0 }))),
        case("of a file", "list_directory", json!({ "path": "old" }), Fails("not_a_directory")),
        case("no limit", "list_directory", json!({ "limit": 0 }), Refuses("limit")),
        case("a new one", "make_directory", json!({ "path": "made" }), Gives(json!({ "created": true }))),
        case("again", "make_directory", json!({ "path": "made" }), Fails("exists")),
        case("again, and fine", "make_directory", json!({ "path": "made", "parents": true }),
            Gives(json!({ "created": false }))),
        case("deep", "make_directory", json!({ "path": "made/a/b" }), Fails("not_found")),
        case("deep, with those above", "make_directory", json!({ "path": "made/a/b", "parents": true }),
            Gives(json!({ "created": true }))),
        case("where a file is", "make_directory", json!({ "path": "old", "parents": true }), Fails("exists")),
        case("to a new name", "move_path", json!({ "source": "old", "destination": "void/new" }),
            Gives(json!({ "atomic": true }))),
        case("what is gone", "move_path", json!({ "source": "old", "destination": "older" }), Fails("not_found")),
        case("onto a file", "move_path", json!({ "source": "void/new", "destination": "target" }), Fails("exists")),
        case("over a file", "move_path", json!({ "source": "void/new", "destination": "target", "overwrite": true }),
            Gives(json!({}))),
        case("over a directory", "move_path", json!({ "source": "target", "destination": "void", "overwrite": true }),
            Fails("is_a_directory")),
        case("a directory over a file", "move_path",
            json!({ "source": "void", "destination": "target", "overwrite": true }),
            Fails("not_a_directory")),
        case("a directory into itself", "move_path", json!({ "source": "void", "destination": "void/x" }),
            Fails("invalid")),
        case("into what is not there", "move_path", json!({ "source": "target", "destination": "p/q/r" }),
            Fails("not_found")),
        case("into what is made", "move_path",
            json!({ "source": "target", "destination": "p/q/r", "create_parents": true }),
            Gives(json!({}))),
        case("to another file system", "move_path",
            json!({ "source": "p", "destination": format!("/dev/shm/{}", bench.credentials.executor) }),
            Gives(json!({ "atomic": false }))),
        case("and back", "move_path",
            json!({ "source": format!("/dev/shm/{}", bench.credentials.executor), "destination": "back" }),
            Gives(json!({ "atomic": false }))),
        case("a link, not its file", "remove_path", json!({ "path": "link" }), Gives(json!({}))),
        case("a directory that holds something", "remove_path", json!({ "path": "tree" }), Fails("not_empty")),
        case("with all it holds", "remove_path", json!({ "path": "tree", "recursive": true }), Gives(json!({}))),
        case("what is gone", "remove_path", json!({ "path": "tree", "recursive": true }), Fails("not_found")),
        case("an empty directory", "remove_path", json!({ "path": "void" }), Gives(json!({}))),
        case("the root", "remove_path", json!({ "path": "/", "recursive": true }), Fails("invalid")),
        case("the root by another name", "remove_path", json!({ "path": "/tmp/../..", "recursive": true }),
            Fails("invalid")),
        case("no yes", "remove_path", json!({ "path": "text", "recursive": "yes" }), Refuses("recursive")),
    ];
    bench.hold(cases).await;

    assert_eq!((bench.content("text"), bench.content("nowhere")), ("by link\n".into(), "now".into()));
    assert!(bench.file("broken").is_symlink() && !bench.file("link").exists());
    assert_eq!((bench.content("back/q/r"), bench.mode("back/q/r")), ("2".into(), 0o750));
    assert!(!has_staged(bench.executor.home()), "no call has left anything");
}

#[tokio::test(flavor = "multi_thread")]
async fn no_tool_takes_a_path_that_is_none() {
    let bench = Workbench::start().await;
    bench.put("file", "a\n");
    symlink("round", bench.file("round")).unwrap();
    let mut cases = Vec::new();
    for (tool, field, rest) in PATHS {
        let with = |path: &str| with_path(rest, field, path);
        cases.push(case("empty", tool, with(""), Refuses(field)));
        cases.push(case("with NUL", tool, with("a\0b"), Refuses(field)));
        cases.push(case("too long", tool, with(&"x/".repeat(2049)), Refuses(field)));
        cases.push(case("a name too long", tool, with(&"x".repeat(300)), Fails("invalid")));
        cases.push(case("of another type", tool, with_path(rest, field, "x"), Gives(json!({}))));
        let loops = match *tool {
            // These are about the link itself.
            "stat" | "remove_path" | "move_path" => continue,
            "make_directory" => with("round/x"),
            _ => with("round"),
        };
        cases.push(case("a loop of links", tool, loops, Fails("symlink_loop")));
    }
    // What has the wrong type is not text at all.
    for case in cases.iter_mut().filter(|case| case.says == "of another type") {
        let field = PATHS.iter().find(|(tool, field, _)| *tool == case.tool && case.arguments[field] == "x").unwrap().1;
        case.arguments[field] = json!(["x"]);
        case.then = Refuses(field);
    }
    bench.hold(cases).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn names_of_every_kind_go_through_every_tool() {
    let bench = Workbench::start().await;
    let mut cases = Vec::new();
    for name in ["-rf", "--help", "a b", "it's \"$HOME\" `id`", "line\nbreak", "*", "[a]", "Grüße 🌍", "~x", "a\\b"]
    {
        let moved = format!("d/{name} moved");
        cases.extend([
            case(
                "made",
                "write_file",
                json!({ "path": format!("d/{name}"), "content": "old\n", "create_parents": true }),
                Gives(json!({ "created": true })),
            ),
            case(
                "edited",
                "edit_file",
                json!({ "path": format!("d/{name}"), "old_string": "old", "new_string": "new" }),
                Gives(json!({ "replacements": 1 })),
            ),
            case("looked at", "stat", json!({ "path": format!("d/{name}") }), Gives(json!({ "kind": "file" }))),
            case("found", "find_files", json!({ "path": "d", "pattern": "*" }), Gives(json!({ "paths": [name] }))),
            case(
                "moved",
                "move_path",
                json!({ "source": format!("d/{name}"), "destination": &moved }),
                Gives(json!({})),
            ),
            case(
                "read",
                "read_file",
                json!({ "path": &moved, "hash": true, "offset": 1 }),
                Gives(json!({ "sha256": sha256("new\n") })),
            ),
            case("removed", "remove_path", json!({ "path": &moved, "recursive": true }), Gives(json!({}))),
        ]);
    }
    bench.hold(cases).await;

    bench.put("-d/-x y", "needle\n");
    let found = bench.done("search_files", json!({ "path": "-d", "pattern": "needle" })).await;
    assert_eq!(found["matches"][0]["path"], "-x y");
}

#[tokio::test(flavor = "multi_thread")]
async fn lines_come_as_they_are_and_never_too_many() {
    let bench = Workbench::start().await;
    let lines: String = (1..=5000).map(|line| format!("line {line}\r\n")).collect();
    bench.put("long", &lines);
    bench.put("wide", format!("{}\nend", "ä".repeat(300 * 1024)));
    let read = async |arguments: Value| bench.text("read_file", arguments).await;

    assert_eq!(read(json!({ "path": "long", "start_line": 4999 })).await, "line 4999\r\nline 5000\r\n");
    let numbered = json!({ "path": "long", "start_line": 9, "end_line": 10, "line_numbers": true });
    assert_eq!(read(numbered).await, "     9\tline 9\r\n    10\tline 10\r\n");

    let mut whole = String::new();
    let mut next = 1;
    while whole.len() < lines.len() {
        let result = bench.caller.result("box", "read_file", json!({ "path": "long", "start_line": next })).await;
        whole += result["content"][0]["text"].as_str().unwrap();
        next = result["structuredContent"]["end_line"].as_u64().unwrap() + 1;
        assert_eq!(result["structuredContent"]["truncated"], whole.len() < lines.len());
    }
    assert!(whole == lines, "the pages together are not the file");

    let wide = bench.caller.result("box", "read_file", json!({ "path": "wide", "encoding": "text" })).await;
    assert_eq!(wide["structuredContent"]["truncated"], true);
    assert_eq!(wide["content"][0]["text"].as_str().unwrap().len(), 256 * 1024);
    assert_eq!(read(json!({ "path": "wide", "start_line": 2 })).await, "end");
}

#[tokio::test(flavor = "multi_thread")]
async fn ten_thousand_files_are_listed_found_and_searched_in_bounds() {
    let bench = Workbench::start().await;
    std::fs::create_dir(bench.file("many")).unwrap();
    for file in 0..10_000 {
        std::fs::write(bench.file(&format!("many/{file:05}.txt")), if file % 1000 == 7 { "needle" } else { "hay" })
            .unwrap();
    }

    let mut seen = Vec::new();
    let mut cursor = Value::Null;
    loop {
        let page = bench.done("list_directory", json!({ "path": "many", "limit": 1000, "cursor": cursor })).await;
        assert_eq!(page["total"], 10_000);
        seen.extend(page["entries"].as_array().unwrap().iter().map(|entry| entry["name"].as_str().unwrap().to_owned()));
        cursor = page["next_cursor"].clone();
        if page["truncated"] == false {
            break;
        }
    }
    assert!(seen.len() == 10_000 && seen.is_sorted(), "{} entries", seen.len());

    let found = bench.done("find_files", json!({ "path": "many", "pattern": "*7.txt", "limit": 10_000 })).await;
    assert_eq!((found["paths"].as_array().unwrap().len(), &found["truncated"]), (1000, &json!(false)));
    let found = bench.done("search_files", json!({ "path": "many", "pattern": "needle|nothing" })).await;
    assert_eq!((found["matches"].as_array().unwrap().len(), &found["truncated"]), (10, &json!(false)));
    let found = bench.done("search_files", json!({ "path": "many", "pattern": "^...$", "limit": 5 })).await;
    assert_eq!((found["matches"].as_array().unwrap().len(), &found["truncated"]), (5, &json!(true)));
}

/// Fault 52: of a large file no more is read than what is asked for.
#[tokio::test(flavor = "multi_thread")]
async fn a_slice_of_a_file_larger_than_memory_is_read() {
    let bench = Workbench::start().await;
    let file = std::fs::File::create(bench.file("sparse")).unwrap();
    file.set_len(1 << 40).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, b"here", 1 << 39).unwrap();

    let text = bench.text("read_file", json!({ "path": "sparse", "offset": 1u64 << 39, "limit": 4 })).await;

    assert_eq!(STANDARD.decode(text).unwrap(), b"here");
    #[rustfmt::skip]
    let cases = vec![
        case("all of it", "read_file", json!({ "path": "sparse" }), Fails("too_large")),
        case("to edit", "edit_file", json!({ "path": "sparse", "old_string": "h", "new_string": "t" }),
            Fails("too_large")),
        case("to search", "search_files", json!({ "path": ".", "pattern": "here", "glob": "sparse" }),
            Gives(json!({ "matches": [] }))),
    ];
    bench.hold(cases).await;
}

/// Fault 52: who reads a file while it is written sees the old content or the new one.
#[tokio::test(flavor = "multi_thread")]
async fn a_reader_never_sees_a_part_of_what_is_written() {
    let bench = Workbench::start().await;
    let contents = [vec![b'a'; 3 * MIB], vec![b'b'; MIB + 1]];
    bench.put("file", &contents[0]);
    let path = bench.file("file");
    let (stop, stopped) = std::sync::mpsc::channel::<()>();
    let reader = std::thread::spawn(move || {
        let mut reads = 0;
        while stopped.try_recv().is_err() {
            let read = std::fs::read(&path).unwrap();
            let kind = read[0];
            assert_eq!(read.len(), if kind == b'a' { 3 * MIB } else { MIB + 1 });
            assert!(read.iter().all(|byte| *byte == kind), "two contents in one");
            reads += 1;
        }
        reads
    });
    for round in 0..8 {
        let content = STANDARD.encode(&contents[(round + 1) % 2]);
        bench.done("write_file", json!({ "path": "file", "content_b64": content })).await;
    }
    stop.send(()).unwrap();
    assert!(reader.join().unwrap() > 0);
}

/// Has the executor find these programs before the system's. Each does what stands in the file of its name in `hooks`,
/// if there is one, before it is the system's.
fn hook(command: &mut Command, home: &Path, programs: &[&str]) {
    let search = std::env::var("PATH").unwrap();
    for directory in ["programs", "hooks"] {
        std::fs::create_dir(home.join(directory)).unwrap();
    }
    for program in programs {
        let path = home.join("programs").join(program);
        let hook = home.join("hooks").join(program).display().to_string();
        let first = format!("if [ -e '{hook}' ]; then . '{hook}'; fi");
        std::fs::write(&path, format!("#!/bin/sh\n{first}\nPATH='{search}' exec {program} \"$@\"\n")).unwrap();
        std::fs::set_permissions(path, PermissionsExt::from_mode(0o755)).unwrap();
    }
    command.env("PATH", format!("{}:{search}", home.join("programs").display()));
}

async fn with_hooks(programs: &'static [&'static str]) -> Workbench {
    Workbench::of(|_| {}, |command, home| hook(command, home, programs)).await
}

/// A hook that says that it was reached, and waits until it may go on.
fn wait_at(home: &Path) -> String {
    let home = home.display();
    format!("echo >'{home}/reached'; while [ ! -e '{home}/go' ]; do sleep 0.02; done")
}

async fn is_there(path: &Path) {
    eventually(&path.display().to_string(), async || path.exists().then_some(())).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_edit_of_a_file_that_changes_meanwhile_is_refused_with_its_hash() {
    let bench = with_hooks(&["sha256sum"]).await;
    bench.put("file", "one two\n");
    // The script asks for the hash after the file was read.
    bench.put("hooks/sha256sum", format!("echo another >>'{}'", bench.file("file").display()));

    let edit = json!({ "path": "file", "old_string": "one", "new_string": "1" });
    let result = bench.caller.result("box", "edit_file", edit.clone()).await;

    assert_eq!(bench.content("file"), "one two\nanother\n", "what somebody else wrote is not lost");
    let content = result["structuredContent"].clone();
    assert_eq!(
        (&content["code"], &content["current_sha256"]),
        (&json!("changed"), &json!(sha256("one two\nanother\n")))
    );
    std::fs::remove_file(bench.file("hooks/sha256sum")).unwrap();
    bench.done("edit_file", edit).await;
    bench.has_nothing_staged().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_program_that_is_missing_at_the_executor_does_not_look_like_nothing_found() {
    let bench = with_hooks(&["find"]).await;
    bench.put("hooks/find", "echo 'sh: find: not found' >&2; exit 127");

    #[rustfmt::skip]
    let cases = vec![
        case("by name", "find_files", json!({ "pattern": "*" }), Fails("failed")),
        case("by content", "search_files", json!({ "pattern": "text" }), Fails("failed")),
    ];
    bench.hold(cases).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rename_that_fails_leaves_the_former_file_and_nothing_else() {
    let bench = with_hooks(&["mv"]).await;
    bench.put("file", "former");
    bench.put("hooks/mv", "echo 'mv: cannot move: No space left on device' >&2; exit 1");

    #[rustfmt::skip]
    let cases = vec![
        case("written", "write_file", json!({ "path": "file", "content": "new" }), Fails("no_space")),
        case("new", "write_file", json!({ "path": "a/b", "content": "new", "create_parents": true }),
            Fails("no_space")),
    ];
    bench.hold(cases).await;

    assert!(bench.content("file") == "former" && !bench.file("a").exists());
    bench.has_nothing_staged().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_caller_who_leaves_while_a_file_is_sent_leaves_the_former_one() {
    let bench = Workbench::start().await;
    let (former, new) = (noise(1, 1000), noise(2, 24 * MIB));
    bench.put("file", &former);
    let body = json!({ "tool": "write_file", "arguments": { "path": "file", "content_b64": STANDARD.encode(&new) } });

    for _ in 0..3 {
        let writing = bench.caller.post("/api/connectors/envs/box/tool/call", body.clone());
        let staged = eventually("some of it is staged", async || has_staged(bench.executor.home()).then_some(()));
        tokio::select! {
            () = staged => {}
            _ = writing => panic!("it was written before it was staged"),
        }
        bench.has_nothing_staged().await;
        let left = std::fs::read(bench.file("file")).unwrap();
        // What had begun to take its place by then was brought to its end.
        assert!(left == former || left == new, "{} bytes of neither content", left.len());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_content_on_its_way_is_open_to_nobody_whom_the_file_is_not() {
    let bench = with_hooks(&["sha256sum"]).await;
    bench.put("file", "former");
    std::fs::set_permissions(bench.file("file"), PermissionsExt::from_mode(0o600)).unwrap();
    bench.put("hooks/sha256sum", wait_at(bench.executor.home()));
    let edit = json!({ "path": "file", "old_string": "former", "new_string": "secret" });

    // Before the script has come to the mode.
    let reached = bench.file("reached");
    let check = async {
        is_there(&reached).await;
        let mut entries = std::fs::read_dir(bench.executor.home()).unwrap().flatten();
        let staged = entries.find(|entry| entry.file_name().to_string_lossy().starts_with(".exec-gateway-")).unwrap();
        let mode = staged.metadata().unwrap().permissions().mode() & 0o777;
        bench.put("go", "");
        mode
    };
    let (mode, _) = tokio::join!(check, bench.done("edit_file", edit));

    assert_eq!((mode, bench.content("file").as_str()), (0o600, "secret"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_commit_that_has_begun_comes_to_its_end_without_its_caller() {
    let bench = with_hooks(&["mv"]).await;
    bench.put("file", "former");
    bench.put("hooks/mv", wait_at(bench.executor.home()));
    let body = json!({ "tool": "write_file", "arguments": { "path": "file", "content": "new" } });

    let reached = bench.file("reached");
    tokio::select! {
        () = is_there(&reached) => {}
        answer = bench.caller.post("/api/connectors/envs/box/tool/call", body) => panic!("{answer:?}"),
    }
    bench.put("go", "");

    eventually("the new content", async || (bench.content("file") == "new").then_some(())).await;
    bench.has_nothing_staged().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_commit_whose_link_is_lost_is_told_when_it_is_back() {
    let gateway = TestGateway::start().await;
    let (caller, credentials) = (gateway.caller("w").await, gateway.executor("w", "box").await);
    let proxy = Proxy::to(gateway.address()).await;
    let url = format!("http://{}", proxy.address);
    let executor =
        CodexExecutor::start_with(&url, &credentials, |command, home| hook(command, home, &["sha256sum", "mv"])).await;
    executor.seen_by(&caller, "box").await;
    let bench = Workbench { caller, executor, credentials, gateway };
    bench.put("file", "former");
    bench.put("hooks/mv", wait_at(bench.executor.home()));

    let caller = bench.caller.clone();
    let edit = json!({ "path": "file", "old_string": "former", "new_string": "new" });
    let editing = tokio::spawn(async move { caller.result("box", "edit_file", edit).await });
    is_there(&bench.file("reached")).await;
    proxy.shut();
    let registry = &bench.gateway.gateway.api().corridor.registry;
    eventually("the link is gone", async || registry.is_empty().then_some(())).await;
    bench.put("go", "");
    eventually("the new content", async || (bench.content("file") == "new").then_some(())).await;
    proxy.open();

    let result = editing.await.unwrap();
    assert_eq!(result["structuredContent"]["sha256"], sha256("new"), "{result}");
    bench.has_nothing_staged().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_search_whose_caller_leaves_is_ended() {
    let bench = with_hooks(&["find"]).await;
    let marker = Marker::new();
    bench.put("file", "text");
    bench.put("hooks/find", format!("sleep {marker}"));
    let body = json!({ "tool": "search_files", "arguments": { "pattern": "text" } });

    let searching = bench.caller.post("/api/connectors/envs/box/tool/call", body);
    tokio::select! {
        () = marker.is_on(1) => {}
        answer = searching => panic!("{answer:?}"),
    }
    marker.is_on(0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_may_not_be_and_what_has_no_room_is_said() {
    if !has_namespaces() {
        return;
    }
    let bench = Workbench::of(
        |_| {},
        |command, home| {
            std::fs::create_dir_all(home.join("small")).unwrap();
            in_namespaces(command, "mount -t tmpfs -o size=1m none \"$HOME/small\" || exit");
        },
    )
    .await;
    for (name, mode) in [("unreadable", 0o000), ("readonly", 0o444)] {
        bench.put(name, "text");
        std::fs::set_permissions(bench.file(name), PermissionsExt::from_mode(mode)).unwrap();
    }
    bench.put("locked/file", "text");
    bench.put("open/file", "text");
    bench.put("tree/open/file", "text");
    bench.put("tree/locked/file", "text");
    for (name, mode) in [("locked", 0o000), ("open", 0o555), ("tree/locked", 0o000)] {
        std::fs::set_permissions(bench.file(name), PermissionsExt::from_mode(mode)).unwrap();
    }
    let large = "x".repeat(2 * MIB);
    #[rustfmt::skip]
    let cases = vec![
        case("not to be read", "read_file", json!({ "path": "unreadable" }), Fails("no_permission")),
        case("not to be edited", "edit_file", json!({ "path": "unreadable", "old_string": "a", "new_string": "b" }),
            Fails("no_permission")),
        case("not to be written", "write_file", json!({ "path": "readonly" }), Fails("no_permission")),
        case("in a directory not to be written", "write_file", json!({ "path": "open/new" }),
            Fails("no_permission")),
        case("in one not to be entered", "read_file", json!({ "path": "locked/file" }), Fails("no_permission")),
        case("in one not to be entered", "stat", json!({ "path": "locked/file" }), Fails("no_permission")),
        case("in one not to be entered", "write_file", json!({ "path": "locked/a/b", "create_parents": true }),
            Fails("no_permission")),
        case("in one not to be written", "remove_path", json!({ "path": "open/file" }), Fails("no_permission")),
        case("in one not to be written", "remove_path", json!({ "path": "open", "recursive": true }),
            Fails("no_permission")),
        case("in one not to be written", "make_directory", json!({ "path": "open/x" }), Fails("no_permission")),
        case("out of one not to be written", "move_path", json!({ "source": "open/file", "destination": "moved" }),
            Fails("no_permission")),
        case("not to be listed", "list_directory", json!({ "path": "locked" }), Fails("no_permission")),
        case("not to be walked", "find_files", json!({ "path": "locked", "pattern": "*" }), Fails("no_permission")),
        case("with a part not to be walked", "find_files", json!({ "path": "tree", "pattern": "*" }),
            Gives(json!({ "paths": ["open/file"], "unreadable": 1 }))),
        case("with a part not to be walked", "search_files", json!({ "path": "tree", "pattern": "text" }),
            Gives(json!({ "unreadable": 1 }))),
        case("that fits", "write_file", json!({ "path": "small/file", "content": "former" }), Gives(json!({}))),
        case("that does not fit", "write_file", json!({ "path": "small/file", "content": large }),
            Fails("no_space")),
        case("that does not fit", "write_file", json!({ "path": "small/new", "content": large }),
            Fails("no_space")),
        case("the former one", "read_file", json!({ "path": "small/file", "encoding": "text" }),
            Gives(json!({ "sha256": sha256("former") }))),
    ];
    bench.hold(cases).await;
    eventually("what did not fit is removed", async || {
        let listed = bench.done("list_directory", json!({ "path": "small" })).await;
        (listed["total"] == 1).then_some(())
    })
    .await;
    for name in ["locked", "open", "tree/locked"] {
        std::fs::set_permissions(bench.file(name), PermissionsExt::from_mode(0o755)).unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_shell_files_are_written_directly_and_say_so() {
    if !has_namespaces() {
        return;
    }
    // The program is there, and nobody may run it.
    let hide = "mount --bind /dev/null \"$(readlink -f /bin/sh)\" || exit";
    let bench = Workbench::of(|_| {}, |command, _| in_namespaces(command, hide)).await;
    bench.put("old", "old");
    bench.put("d/a.rs", "fn one() {}\n");
    bench.put("d/e/b.rs", "fn two() {}\n");
    bench.put("d/.git/x", "fn");
    std::fs::set_permissions(bench.file("old"), PermissionsExt::from_mode(0o750)).unwrap();
    #[rustfmt::skip]
    let cases = vec![
        case("new", "write_file",
            json!({ "path": "x/y", "content": "1", "create_parents": true, "if_match": "none" }),
            Gives(json!({ "atomic": false, "created": true }))),
        case("replaced", "write_file", json!({ "path": "old", "content": "new", "if_match": sha256("old") }),
            Gives(json!({ "atomic": false, "created": false }))),
        case("changed", "write_file", json!({ "path": "old", "content": "3", "if_match": sha256("old") }),
            Fails("changed")),
        case("there already", "write_file", json!({ "path": "old", "if_match": "none" }), Fails("exists")),
        case("edited", "edit_file", json!({ "path": "old", "old_string": "new", "new_string": "newer" }),
            Gives(json!({ "atomic": false, "sha256": sha256("newer") }))),
        case("hashed", "read_file", json!({ "path": "old", "offset": 1, "hash": true }),
            Gives(json!({ "sha256": sha256("newer") }))),
        case("looked at", "stat", json!({ "path": "old" }), Gives(json!({ "kind": "file", "size": 5 }))),
        case("not there", "stat", json!({ "path": "none" }), Fails("not_found")),
        case("found", "find_files", json!({ "path": "d", "pattern": "**/*.rs" }),
            Gives(json!({ "paths": ["a.rs", "e/b.rs"] }))),
        case("searched", "search_files", json!({ "path": "d", "pattern": "two" }),
            Gives(json!({ "matches": [{ "path": "e/b.rs", "line": 1, "text": "fn two() {}" }] }))),
        case("moved", "move_path", json!({ "source": "d", "destination": "f" }), Gives(json!({ "atomic": false }))),
        case("moved onto", "move_path", json!({ "source": "f", "destination": "old" }), Fails("exists")),
        case("removed", "remove_path", json!({ "path": "f", "recursive": true }), Gives(json!({}))),
    ];
    bench.hold(cases).await;
    assert_eq!((bench.content("old"), bench.mode("old"), bench.content("x/y")), ("newer".into(), 0o750, "1".into()));
    bench.has_nothing_staged().await;
}
