//! `apply_patch` on the real executor: what a patch says happens to all of its files, or to none.

use std::collections::BTreeMap;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::process::Command;

use exec_gateway::admin::{Request, Response};
use exec_gateway::config::Config;
use exec_gateway::protocol::ids::WorkspaceId;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tokio::task::JoinHandle;

use crate::support::{Answer, Caller, CodexExecutor, MIB, Proxy, Scratch, TestGateway, Workbench, eventually};

/// What is below a directory: contents of files by their paths.
type Tree = BTreeMap<String, String>;

fn tree(files: &[(&str, &str)]) -> Tree {
    files.iter().map(|(name, content)| ((*name).to_owned(), (*content).to_owned())).collect()
}

fn write(root: &Path, files: &Tree) {
    std::fs::create_dir_all(root).unwrap();
    for (name, content) in files {
        std::fs::create_dir_all(root.join(name).parent().unwrap()).unwrap();
        std::fs::write(root.join(name), content).unwrap();
    }
}

/// All of it, hidden files included: a staged content that was left behind would be seen.
fn read(root: &Path) -> Tree {
    let mut files = Tree::new();
    let mut folders = vec![root.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in folder.read_dir().unwrap().map(|entry| entry.unwrap()) {
            let name = entry.path().strip_prefix(root).unwrap().to_str().unwrap().to_owned();
            match entry.file_type().unwrap().is_dir() {
                true => folders.push(entry.path()),
                false => drop(files.insert(name, std::fs::read_to_string(entry.path()).unwrap_or_default())),
            }
        }
    }
    files
}

fn sha256(content: &str) -> String {
    format!("{:x}", Sha256::digest(content))
}

fn mode(path: &Path) -> u32 {
    path.metadata().unwrap().permissions().mode() & 0o777
}

fn set_mode(path: &Path, mode: u32) {
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
}

fn codex(sections: &str) -> String {
    format!("*** Begin Patch\n{sections}*** End Patch\n")
}

impl Workbench {
    async fn patch(&self, arguments: Value) -> Value {
        self.caller.result("box", "apply_patch", arguments).await
    }

    /// The result of a patch that fails, and the code of its failure.
    async fn patch_fails(&self, arguments: Value) -> (Value, String) {
        let result = self.patch(arguments).await;
        assert_eq!(result["isError"], true, "{result}");
        let code = result["structuredContent"]["code"].as_str().unwrap().to_owned();
        (result, code)
    }
}

fn text(result: &Value) -> &str {
    result["content"][0]["text"].as_str().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn patches_do_what_they_say() {
    let bench = Workbench::start().await;
    let git = |file: &str, lines: &str| format!("diff --git a/{file} b/{file}\n{lines}");
    for (name, before, patch, after) in [
        (
            "a file in a directory that is not there",
            tree(&[]),
            codex("*** Add File: new/deep/file.txt\n+one\n+\n+three\n"),
            tree(&[("new/deep/file.txt", "one\n\nthree\n")]),
        ),
        (
            "a file over another, which codex replaces",
            tree(&[("f", "long former content\n")]),
            codex("*** Add File: f\n+new\n"),
            tree(&[("f", "new\n")]),
        ),
        (
            "a move with its hunks",
            tree(&[("from", "a\nb\n"), ("stays", "x")]),
            codex("*** Update File: from\n*** Move to: to/here\n@@\n a\n-b\n+c\n"),
            tree(&[("to/here", "a\nc\n"), ("stays", "x")]),
        ),
        (
            "a move alone",
            tree(&[("from", "a\nb")]),
            codex("*** Update File: from\n*** Move to: to\n"),
            tree(&[("to", "a\nb")]),
        ),
        (
            "every kind of section at once",
            tree(&[("update", "a\n"), ("delete", "b\n"), ("move", "c\n")]),
            codex(
                "*** Add File: add\n+d\n*** Update File: update\n-a\n+x\n*** Delete File: delete\n*** Update File: \
                 move\n*** Move to: moved\n-c\n+y\n",
            ),
            tree(&[("add", "d\n"), ("update", "x\n"), ("moved", "y\n")]),
        ),
        (
            "sections of one file see each other",
            tree(&[("f", "a\n")]),
            codex("*** Update File: f\n-a\n+b\n*** Update File: ./f\n*** Move to: g\n-b\n+c\n*** Add File: f\n+new\n"),
            tree(&[("f", "new\n"), ("g", "c\n")]),
        ),
        (
            "line ends of Windows",
            tree(&[("f", "a\r\nb\r\nc")]),
            codex("*** Update File: f\n@@\n a\n-b\n+x\n+y\n"),
            tree(&[("f", "a\r\nx\r\ny\r\nc")]),
        ),
        (
            "an anchor is a whole line, and new lines alone go behind it",
            tree(&[("f", "fn ab() {\n}\nfn a\n}\nend\n")]),
            codex("*** Update File: f\n@@ fn a\n+    body\n"),
            tree(&[("f", "fn ab() {\n}\nfn a\n    body\n}\nend\n")]),
        ),
        (
            "the end of the file, though the lines are there before",
            tree(&[("f", "a\nb\na\n")]),
            codex("*** Update File: f\n@@\n-a\n+x\n*** End of File\n"),
            tree(&[("f", "a\nb\nx\n")]),
        ),
        (
            "a diff of git: edit, rename, new and deleted file",
            tree(&[("edit", "a\nb\n"), ("old name", "a\nb\n"), ("gone", "x\n")]),
            git("edit", "--- a/edit\n+++ b/edit\n@@ -1,2 +1,2 @@\n a\n-b\n+c\n\\ No newline at end of file\n")
                + "diff --git a/old name b/ü\nrename from old name\nrename to \"\\303\\274\"\n"
                + "--- a/old name\t\n+++ \"b/\\303\\274\"\n@@ -1,2 +1,2 @@\n a\n-b\n+c\n"
                + &git("new", "new file mode 100644\n--- /dev/null\n+++ b/new\n@@ -0,0 +1 @@\n+n\n")
                + &git("gone", "deleted file mode 100644\n--- a/gone\n+++ /dev/null\n@@ -1 +0,0 @@\n-x\n"),
            tree(&[("edit", "a\nc"), ("ü", "a\nc\n"), ("new", "n\n")]),
        ),
        (
            "a plain diff whose line numbers are off",
            tree(&[("f", "1\n2\n3\n4\n5\n6\n7\n8\n")]),
            "--- f\n+++ f\n@@ -1,3 +1,3 @@\n 6\n-7\n+x\n 8\n".to_owned(),
            tree(&[("f", "1\n2\n3\n4\n5\n6\nx\n8\n")]),
        ),
        (
            "names of every kind",
            tree(&[("-f", "a\n"), ("a b's \"c\" $(d)", "a\n")]),
            codex(
                "*** Update File: -f\n-a\n+x\n*** Update File: a b's \"c\" $(d)\n-a\n+x\n*** Add File: `é`;\\n\n+x\n",
            ),
            tree(&[("-f", "x\n"), ("a b's \"c\" $(d)", "x\n"), ("`é`;\\n", "x\n")]),
        ),
    ] {
        let directory = bench.file(&name.replace(' ', "-"));
        write(&directory, &before);

        let looked = bench.patch(json!({ "patch": patch, "cwd": directory, "dry_run": true })).await;
        assert_eq!((&looked["isError"], read(&directory)), (&json!(false), before), "{name}, dry: {looked}");
        let result = bench.patch(json!({ "patch": patch, "cwd": directory })).await;

        assert_eq!((&result["isError"], read(&directory)), (&json!(false), after), "{name}: {result}");
        assert!(text(&result).lines().all(|line| line.ends_with(": ok")), "{name}: {result}");
        assert_eq!(looked["structuredContent"]["files"], result["structuredContent"]["files"], "{name}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_answer_tells_each_section_and_what_the_file_is_now() {
    let bench = Workbench::start().await;
    write(bench.executor.home(), &tree(&[("u", "a\n"), ("m", "b\n"), ("d", "c\n")]));
    let patch = codex("*** Update File: u\n-a\n+x\n*** Update File: m\n*** Move to: n\n*** Delete File: d\n");

    let result = bench.patch(json!({ "patch": patch })).await;

    assert_eq!(text(&result), "u: ok\nm: ok\nd: ok");
    assert_eq!(
        result["structuredContent"],
        json!({ "atomic": true, "dry_run": false, "files": [
            { "path": "u", "operation": "update", "sha256": sha256("x\n") },
            { "path": "m", "operation": "move", "to": "n", "sha256": sha256("b\n") },
            { "path": "d", "operation": "delete" },
        ]})
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn modes_and_links_are_kept_unless_the_patch_changes_them() {
    let bench = Workbench::start().await;
    for (name, bits) in [("edited", 0o750), ("moved", 0o4711 & 0o777), ("on", 0o640), ("off", 0o755), ("linked", 0o600)]
    {
        std::fs::write(bench.file(name), "a\n").unwrap();
        set_mode(&bench.file(name), bits);
    }
    symlink("linked", bench.file("link")).unwrap();
    let edit = "@@ -1 +1 @@\n-a\n+b\n";
    let patch = format!(
        "--- a/edited\n+++ b/edited\n{edit}--- a/link\n+++ b/link\n{edit}\
         diff --git a/moved b/there\nrename from moved\nrename to there\n--- a/moved\n+++ b/there\n{edit}\
         diff --git a/on b/on\nold mode 100644\nnew mode 100755\n\
         diff --git a/off b/off\nold mode 100755\nnew mode 100644\n--- a/off\n+++ b/off\n{edit}\
         diff --git a/new b/new\nnew file mode 100755\n--- /dev/null\n+++ b/new\n@@ -0,0 +1 @@\n+#!/bin/sh\n"
    );

    let result = bench.patch(json!({ "patch": patch })).await;

    assert_eq!(result["isError"], false, "{result}");
    let modes = ["edited", "there", "on", "off", "linked", "new"].map(|name| mode(&bench.file(name)));
    assert_eq!(modes.map(|mode| format!("{mode:o}")), ["750", "711", "750", "644", "600", "755"]);
    assert!(bench.file("link").is_symlink() && !bench.file("moved").exists());
    assert_eq!(std::fs::read_to_string(bench.file("linked")).unwrap(), "b\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn relative_paths_are_taken_against_cwd_and_both_on_the_executor() {
    let bench = Workbench::start().await;
    write(bench.executor.home(), &tree(&[("a/f", "a\n"), ("f", "a\n")]));
    let absolute = bench.file("absolute");
    let patch = codex(&format!(
        "*** Update File: f\n-a\n+b\n*** Add File: ../up\n+x\n*** Add File: ~/home\n+x\n*** Add File: {}\n+x\n",
        absolute.display()
    ));

    assert_eq!(bench.patch(json!({ "patch": patch, "cwd": "a" })).await["isError"], false);

    let after = [("a/f", "b\n"), ("absolute", "x\n"), ("f", "a\n"), ("home", "x\n"), ("up", "x\n")];
    let files = read(bench.executor.home());
    assert!(after.iter().all(|(name, content)| files.get(*name).is_some_and(|found| found == content)), "{files:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_patch_that_does_not_fit_changes_nothing_and_says_where() {
    let bench = Workbench::start().await;
    let before = tree(&[("good", "a\n"), ("other", "fn f() {\n    one();\n}\n"), ("dir/f", "x\n")]);
    let fine = "*** Update File: good\n-a\n+b\n*** Delete File: dir/f\n*** Add File: new\n+x\n";
    for (name, patch, code, says) in [
        (
            "a hunk",
            codex(&format!("{fine}*** Update File: other\n@@\n fn f() {{\n-    two();\n")),
            "no_match",
            "other: error: hunk 1 context did not match source (line 9 of the patch); the nearest place is line 1; \
             line 2: expected \"    two();\", found \"    one();\"",
        ),
        (
            "an anchor",
            codex(&format!("{fine}*** Update File: other\n@@ fn\n+x\n")),
            "no_match",
            "anchor \"fn\" not found",
        ),
        (
            "a missing file",
            codex(&format!("{fine}*** Update File: none\n-a\n")),
            "not_found",
            "none: error: no such file",
        ),
        (
            "nothing to delete",
            codex(&format!("{fine}*** Delete File: none\n")),
            "not_found",
            "none: error: no such file",
        ),
        ("a directory", codex(&format!("{fine}*** Update File: dir\n-a\n")), "is_a_directory", "dir: error: "),
        (
            "a file for a directory",
            codex(&format!("{fine}*** Add File: good/f\n+x\n")),
            "not_a_directory",
            "good/f: error: ",
        ),
        (
            "a new file that is there",
            "--- /dev/null\n+++ b/new\n@@ -0,0 +1 @@\n+x\n--- /dev/null\n+++ b/good\n@@ -0,0 +1 @@\n+x\n".into(),
            "exists",
            "good: error: a file is there already",
        ),
        (
            "a deletion that leaves something",
            "--- a/other\n+++ /dev/null\n@@ -1 +0,0 @@\n-fn f() {\n".into(),
            "no_match",
            "other: error: the file has more lines than the patch deletes",
        ),
        (
            "a target of a rename that is there",
            "diff --git a/good b/other\nrename from good\nrename to other\n".into(),
            "exists",
            "good: error: a file is there already",
        ),
    ] {
        let directory = bench.file(&name.replace(' ', "-"));
        write(&directory, &before);

        let (result, failure) = bench.patch_fails(json!({ "patch": patch, "cwd": directory })).await;

        assert_eq!((failure.as_str(), read(&directory)), (code, before.clone()), "{name}: {result}");
        assert!(text(&result).contains(says), "{name}: {result}");
        let lines: Vec<&str> = text(&result).lines().collect();
        let sections = result["structuredContent"]["files"].as_array().unwrap();
        assert_eq!(lines.len(), sections.len(), "{name}: one line for each section: {result}");
        let spared = sections.iter().zip(lines).filter(|(section, _)| section.get("code").is_none());
        assert!(spared.into_iter().all(|(_, line)| line.ends_with(": not changed")), "{name}: {result}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_section_that_does_not_fit_is_named_at_once() {
    let bench = Workbench::start().await;
    write(bench.executor.home(), &tree(&[("a", "1\n"), ("b", "1\n"), ("c", "1\n")]));
    let patch = codex("*** Update File: a\n-x\n*** Update File: b\n-1\n*** Update File: c\n-y\n");

    let (result, code) = bench.patch_fails(json!({ "patch": patch })).await;

    let codes = result["structuredContent"]["files"].as_array().unwrap().iter().map(|file| file["code"].clone());
    assert_eq!(codes.collect::<Vec<_>>(), [json!("no_match"), Value::Null, json!("no_match")]);
    assert_eq!(code, "no_match");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_text_that_is_no_patch_is_refused_with_its_line_and_touches_nothing() {
    let bench = Workbench::start().await;
    std::fs::write(bench.file("f"), "a\n").unwrap();
    for (patch, message, line) in [
        ("hello", "apply_patch: neither '*** Begin Patch' nor a file section of a unified diff", 1),
        (
            "*** Begin Patch\n*** Update File: f\n-a\n",
            "apply_patch: missing footer: expected '*** End Patch' (line 4)",
            4,
        ),
        (
            "*** Begin Patch\n*** Update File: f\n-a\n+b\n*** Add File: \n*** End Patch",
            "apply_patch: Add File requires a path (line 5)",
            5,
        ),
        ("--- a/f\n+++ b/f\n@@ -1,2 +1 @@\n-a\n", "apply_patch: the hunk of line 3 has not the lines it says", 5),
        ("diff --git a/f b/f\nGIT binary patch\n", "apply_patch: a binary change cannot be applied", 2),
    ] {
        let (result, code) = bench.patch_fails(json!({ "patch": patch })).await;

        assert_eq!((code.as_str(), &result["structuredContent"]["line"]), ("invalid_patch", &json!(line)), "{result}");
        assert!(text(&result).starts_with(message), "{result}");
        assert_eq!(std::fs::read_to_string(bench.file("f")).unwrap(), "a\n");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn arguments_that_cannot_be_are_named() {
    let bench = Workbench::start().await;
    let patch = codex("*** Delete File: f\n");
    for (arguments, message) in [
        (json!({}), "missing field `patch`"),
        (json!({ "patch": ["x"] }), "patch: invalid type: sequence, expected a string"),
        (json!({ "patch": patch, "cwd": "" }), "cwd: the path is empty"),
        (json!({ "patch": patch, "if_match": { "f": "abc" } }), "if_match: expected a SHA-256"),
        (json!({ "patch": patch, "if_match": { "g": "*" } }), "if_match.g: the patch does not name this file"),
        (json!({ "patch": codex("*** Delete File: a\0b\n") }), "patch: the path holds a NUL character"),
        (json!({ "patch": codex(&format!("*** Delete File: {}\n", "x".repeat(5000))) }), "patch: the path is longer"),
    ] {
        let answer = bench.caller.tool("box", "apply_patch", arguments).await;
        assert_eq!((answer.status.as_u16(), answer.code().as_str()), (400, "bad_arguments"), "{message}");
        let told = answer.json()["error"]["message"].as_str().unwrap().to_owned();
        assert!(told.contains(message), "{told}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_patch_is_applied_only_to_what_if_match_says() {
    let bench = Workbench::start().await;
    let before = tree(&[("dir/a", "a\n"), ("dir/b", "b\n")]);
    write(bench.executor.home(), &before);
    let patch = codex("*** Update File: a\n-a\n+x\n*** Update File: b\n-b\n+y\n*** Add File: c\n+z\n");
    let patched =
        async |if_match: Value| bench.patch(json!({ "patch": patch, "cwd": "dir", "if_match": if_match })).await;

    for (if_match, code) in [
        (json!({ "b": sha256("another") }), "changed"),
        (json!({ "c": "*" }), "not_found"),
        (json!({ "c": sha256("z\n") }), "not_found"),
        (json!({ "./a": "none" }), "exists"),
    ] {
        let result = patched(if_match).await;
        assert_eq!(
            (&result["isError"], &result["structuredContent"]["code"]),
            (&json!(true), &json!(code)),
            "{result}"
        );
        assert_eq!(read(&bench.file("dir")), tree(&[("a", "a\n"), ("b", "b\n")]));
    }
    let result = patched(json!({ "b": sha256("another") })).await;
    assert_eq!(result["structuredContent"]["current_sha256"], sha256("b\n"), "what it is instead");
    let result = patched(json!({ "a": sha256("a\n").to_uppercase(), "b": "*", "c": "none" })).await;
    assert_eq!(result["isError"], false, "{result}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_that_only_reads_does_not_patch() {
    let bench = Workbench::start().await;
    let create =
        Request::TokenCreate { workspace: WorkspaceId::new("w").unwrap(), user: None, ttl: None, read_only: true };
    let Response::Token { token, .. } = bench.gateway.admin(create).await else { panic!("no token") };
    let reader = Caller::new(bench.gateway.address(), Some(token.expose().to_owned()));
    for dry_run in [false, true] {
        let patch = codex("*** Add File: f\n+x\n");
        let answer = reader.tool("box", "apply_patch", json!({ "patch": patch, "dry_run": dry_run })).await;
        assert_eq!((answer.status.as_u16(), answer.code().as_str()), (403, "forbidden"));
    }
    assert!(!bench.file("f").exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn files_larger_than_a_patch_may_hold_are_refused() {
    let bench = Workbench::with(|config| config.tools.patch_bytes_max = 1000).await;
    let line = "0123456789\n";
    let before = tree(&[("a", &line.repeat(50)), ("b", &line.repeat(50))]);
    write(&bench.file("dir"), &before);
    let added =
        codex(&format!("*** Update File: a\n-{line}@@\n-{line}*** Add File: c\n{}", format!("+{line}").repeat(60)));
    let both = codex(&format!("*** Update File: a\n-{line}*** Update File: b\n-{line}*** Delete File: a\n"));
    std::fs::write(bench.file("dir/large"), vec![b'x'; 16 * MIB + 1]).unwrap();

    for patch in [&added, &both, &codex("*** Delete File: large\n")] {
        let (result, code) = bench.patch_fails(json!({ "patch": patch, "cwd": "dir" })).await;
        assert_eq!(code, "too_large", "{result}");
    }
    std::fs::remove_file(bench.file("dir/large")).unwrap();
    assert_eq!(read(&bench.file("dir")), before);
}

/// Lets an executor find stand-ins for some of its system's programs first: a program `NAME` runs the lines of
/// `hook-NAME` in the executor's home, if that is there, and then what it stands for.
fn hooked(programs: &[&str], executor: &mut tokio::process::Command, home: &Path) {
    let stand_ins = home.join("stand-ins");
    std::fs::create_dir(&stand_ins).unwrap();
    for program in programs {
        let script = format!(
            "#!/bin/sh\nif [ -e \"$HOME/hook-{program}\" ]; then . \"$HOME/hook-{program}\"; fi\n\
             PATH=${{PATH#*:}}\nexec {program} \"$@\"\n"
        );
        std::fs::write(stand_ins.join(program), script).unwrap();
        set_mode(&stand_ins.join(program), 0o755);
    }
    let path = std::env::var("PATH").unwrap();
    executor.env("PATH", format!("{}:{path}", stand_ins.display()));
}

async fn with_hooks(programs: &[&str]) -> Workbench {
    Workbench::of(|_| {}, |executor, home| hooked(programs, executor, home)).await
}

/// The same behind a link that can be cut.
async fn behind_proxy(programs: &[&str], change: impl FnOnce(&mut Config)) -> (Workbench, Proxy) {
    let gateway = TestGateway::with(change).await;
    let caller = gateway.caller("w").await;
    let credentials = gateway.executor("w", "box").await;
    let proxy = Proxy::to(gateway.address()).await;
    let url = format!("http://{}", proxy.address);
    let executor = CodexExecutor::start_with(&url, &credentials, |command, home| hooked(programs, command, home)).await;
    executor.seen_by(&caller, "box").await;
    (Workbench { caller, executor, credentials, gateway }, proxy)
}

impl Workbench {
    fn hook(&self, program: &str, lines: &str) {
        std::fs::write(self.file(&format!("hook-{program}")), lines).unwrap();
    }

    /// Waits until nothing but these files is in the directory.
    async fn holds(&self, directory: &str, files: &Tree) {
        eventually("the directory holds what it should", async || {
            (read(&self.file(directory)) == *files).then_some(())
        })
        .await;
    }
}

/// Four files, and a patch that changes all: `a` is edited, `b` moved, `c` deleted, `new/d` made.
fn four() -> (Tree, String, Tree) {
    let patch = "*** Update File: a\n-a\n+x\n*** Update File: b\n*** Move to: moved\n-b\n+y\n*** Delete File: c\n\
                 *** Add File: new/d\n+z\n";
    let before = tree(&[("a", "a\n"), ("b", "b\n"), ("c", "c\n"), ("other", "o\n")]);
    let after = tree(&[("a", "x\n"), ("moved", "y\n"), ("new/d", "z\n"), ("other", "o\n")]);
    (before, codex(patch), after)
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_fails_half_way_leaves_every_file_as_it_was() {
    let bench = with_hooks(&["mv", "sha256sum"]).await;
    let (before, patch, after) = four();
    // How often a program is called to put all in place; then it fails at each of these calls in turn.
    let count = r#"echo . >>"$HOME/calls"; "#;
    let calls = async |directory: &str, program: &str, lines: &str| {
        write(&bench.file(directory), &before);
        let _ = std::fs::remove_file(bench.file("calls"));
        bench.hook(program, &format!("{count}{lines}"));
        let result = bench.patch(json!({ "patch": patch, "cwd": directory })).await;
        std::fs::remove_file(bench.file(&format!("hook-{program}"))).unwrap();
        (result, std::fs::read_to_string(bench.file("calls")).unwrap_or_default().lines().count())
    };
    for (program, lines, code) in [
        ("mv", r#"echo "mv: cannot move '$2': No space left on device" >&2; exit 1"#, "no_space"),
        ("sha256sum", r#"echo "sha256sum: read error" >&2; exit 1"#, "failed"),
    ] {
        let (result, moves) = calls(&format!("{program}-all"), program, "").await;
        assert_eq!(result["isError"], false, "{result}");
        assert!(moves >= 4, "{program} is called for every file");
        for failing in 1..=moves {
            let directory = format!("{program}-{code}-{failing}");
            let lines = format!("if [ $(wc -l <\"$HOME/calls\") = {failing} ]; then {lines}; fi\n");
            let (result, _) = calls(&directory, program, &lines).await;

            assert_eq!(
                (&result["isError"], &result["structuredContent"]["code"]),
                (&json!(true), &json!(code)),
                "{result}"
            );
            bench.holds(&directory, &before).await;
            assert!(!bench.file(&directory).join("new").exists(), "a directory was left behind");
        }
    }
    write(&bench.file("fine"), &before);
    assert_eq!(bench.patch(json!({ "patch": patch, "cwd": "fine" })).await["isError"], false);
    assert_eq!(read(&bench.file("fine")), after);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_somebody_else_does_between_reading_and_writing_is_not_overwritten() {
    let bench = with_hooks(&["mkdir", "sha256sum"]).await;
    let (before, patch, _) = four();
    for (name, theirs, code, place) in [
        ("edits a file", "echo theirs >other; echo theirs >a", "changed", "a"),
        ("edits the last file", "echo theirs >c", "changed", "c"),
        ("edits what is moved", "echo theirs >>b", "changed", "b"),
        ("removes a file", "rm -f c", "not_found", "c"),
        ("makes the new file", "mkdir -p new; echo theirs >new/d", "exists", "new/d"),
        ("makes the target of the move", "echo theirs >moved", "exists", "b"),
        ("makes a directory of a file", "rm -f a; mkdir a; echo theirs >a/x", "is_a_directory", "a"),
        ("makes a directory of the target", "mkdir moved; echo theirs >moved/x", "is_a_directory", "b"),
    ] {
        let directory = bench.file(&name.replace(' ', "-"));
        write(&directory, &before);
        // The first hash is taken when all is read and staged.
        bench.hook(
            "sha256sum",
            &format!("if [ ! -e '{0}.done' ]; then touch '{0}.done'; cd '{0}' && {theirs}; fi\n", directory.display()),
        );
        let (result, failure) = bench.patch_fails(json!({ "patch": patch, "cwd": directory })).await;

        assert_eq!(failure, code, "{name}: {result}");
        let failing = format!("{place}: error: ");
        assert!(text(&result).lines().any(|line| line.starts_with(&failing)), "{name}: {result}");
        let twin = bench.file("twin");
        write(&twin, &before);
        assert!(Command::new("sh").arg("-c").arg(theirs).current_dir(&twin).status().unwrap().success());
        bench.holds(&name.replace(' ', "-"), &read(&twin)).await;
        std::fs::remove_dir_all(&twin).unwrap();
    }
}

impl Workbench {
    /// Begins a patch of the files in `dir`.
    fn begin(&self, patch: &str) -> JoinHandle<Answer> {
        let (caller, arguments) = (self.caller.clone(), json!({ "patch": patch, "cwd": "dir" }));
        tokio::spawn(async move { caller.tool("box", "apply_patch", arguments).await })
    }

    /// The third call of the program waits, until [`Self::release`].
    fn halt_at(&self, program: &str) {
        let lines = "echo . >>\"$HOME/calls\"\nif [ $(wc -l <\"$HOME/calls\") = 3 ]; then\n  touch \"$HOME/held\"\n  \
                     until [ -e \"$HOME/go\" ]; do sleep 0.02; done\nfi\n";
        self.hook(program, lines);
    }

    async fn is_held(&self) {
        eventually("the program waits", async || self.file("held").exists().then_some(())).await;
    }

    fn release(&self) {
        std::fs::write(self.file("go"), "").unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_call_dropped_in_the_middle_of_the_change_still_changes_all() {
    let bench = with_hooks(&["mv"]).await;
    let (before, patch, after) = four();
    write(&bench.file("dir"), &before);
    bench.halt_at("mv");
    let call = bench.begin(&patch);
    bench.is_held().await;

    call.abort();
    assert!(call.await.unwrap_err().is_cancelled());
    bench.release();

    bench.holds("dir", &after).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_call_dropped_while_new_contents_are_written_leaves_none_of_them() {
    let bench = Workbench::start().await;
    let before = tree(&[("a", "a\n")]);
    write(&bench.file("dir"), &before);
    let patch = codex(&format!("*** Update File: a\n-a\n+x\n*** Add File: b\n{}", large()));
    let call = bench.begin(&patch);
    eventually("something is staged", async || (read(&bench.file("dir")).len() > 1).then_some(())).await;

    call.abort();
    assert!(call.await.unwrap_err().is_cancelled());

    bench.holds("dir", &before).await;
}

/// Lines to add that take a while to be sent.
fn large() -> String {
    "+0123456789abcde\n".repeat(MIB / 2)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_link_cut_in_the_middle_of_the_change_goes_unnoticed() {
    let (bench, proxy) = behind_proxy(&["mv"], |_| {}).await;
    let (before, patch, after) = four();
    write(&bench.file("dir"), &before);
    bench.halt_at("mv");
    let call = bench.begin(&patch);
    bench.is_held().await;

    proxy.cut();
    bench.release();

    let answer = call.await.unwrap();
    assert_eq!((answer.status.as_u16(), &answer.json()["isError"]), (200, &json!(false)), "{answer:?}");
    bench.holds("dir", &after).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_link_cut_while_new_contents_are_written_goes_unnoticed() {
    let (bench, proxy) = behind_proxy(&[], |_| {}).await;
    let lines = large();
    write(&bench.file("dir"), &tree(&[("a", "a\n")]));
    let patch = codex(&format!("*** Update File: a\n-a\n+x\n*** Add File: b\n{lines}"));
    proxy.cut_after(4 * MIB);

    let answer = bench.begin(&patch).await.unwrap();

    assert_eq!((answer.status.as_u16(), &answer.json()["isError"]), (200, &json!(false)), "{answer:?}");
    assert_eq!(proxy.cuts(), 1);
    bench.holds("dir", &tree(&[("a", "x\n"), ("b", &lines.replace('+', ""))])).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_executor_that_does_not_come_back_keeps_its_files_and_nothing_else() {
    let (bench, proxy) = behind_proxy(&[], |config| config.tools.relink_wait_secs = 1).await;
    let before = tree(&[("a", "a\n")]);
    write(&bench.file("dir"), &before);
    let call = bench.begin(&codex(&format!("*** Update File: a\n-a\n+x\n*** Add File: b\n{}", large())));
    eventually("something is staged", async || (read(&bench.file("dir")).len() > 1).then_some(())).await;

    proxy.shut();
    let answer = call.await.unwrap();
    assert_eq!((answer.status.as_u16(), &answer.json()["error"]["ran"]), (502, &json!("no")), "{answer:?}");
    assert_eq!(std::fs::read_to_string(bench.file("dir/a")).unwrap(), "a\n");
    proxy.open();

    bench.holds("dir", &before).await;
}

/// The sources of this gateway with edits all over them, as `git diff` and `diff -u` tell them.
#[tokio::test(flavor = "multi_thread")]
async fn the_diff_of_a_source_tree_makes_the_one_tree_of_the_other() {
    let bench = Workbench::start().await;
    let mut old = read(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"));
    old.retain(|name, content| name.ends_with(".rs") && content.len() < 64 * 1024);
    let mut new = old.clone();
    for (number, (name, content)) in old.iter().enumerate() {
        let edited = content.split_inclusive('\n').enumerate().map(|(at, line)| match (at + number) % 71 {
            3 => String::new(),
            20 => format!("{line}// added {at}\n{line}"),
            41 => format!("// replaced {at}\n"),
            _ => line.to_owned(),
        });
        let edited: String = edited.collect();
        new.remove(name);
        match number % 15 {
            1 => {}
            2 => drop(new.insert(format!("added/{name}"), edited)),
            3 => drop(new.insert(name.clone(), edited.trim_end().to_owned())),
            _ => drop(new.insert(name.clone(), edited)),
        }
    }
    let scratch = Scratch::new();
    write(&scratch.path().join("a"), &old);
    write(&scratch.path().join("b"), &new);
    for (name, program, arguments) in [
        ("git", "git", &["diff", "--no-index", "--no-renames", "--no-prefix", "a", "b"][..]),
        ("diff", "diff", &["-ruN", "a", "b"]),
    ] {
        let output = Command::new(program).args(arguments).current_dir(scratch.path()).output().unwrap();
        let patch = String::from_utf8(output.stdout).unwrap();
        write(&bench.file(name), &old);

        let result = bench.patch(json!({ "patch": patch, "cwd": name })).await;

        assert_eq!(result["isError"], false, "{result}");
        assert!(result["structuredContent"]["files"].as_array().unwrap().len() > 80);
        assert!(read(&bench.file(name)) == new, "{name}: something else came out");
    }
}
