//! Audited: what of a call stands in the audit log, and what never does.
//!
//! Only what is listed here is copied from arguments: a field that nobody has thought of is not recorded.

use hyper::HeaderMap;
use serde_json::{Map, Value, json};

use super::Api;
use super::error::ApiError;
use crate::audit::{Act, Entry, Outcome};
use crate::auth::Principal;
use crate::protocol::rest::{Content, ToolResult};
use crate::session::Session;
use crate::tools::Tool;

/// Arguments that say what is done. Not among them: what is written, and values of variables.
const RECORDED: [&str; 22] = [
    "command",
    "cwd",
    "path",
    "paths",
    "from",
    "to",
    "source",
    "destination",
    "from_path",
    "to_path",
    "source_path",
    "destination_path",
    "from_environment_id",
    "to_environment_id",
    "source_environment_id",
    "destination_environment_id",
    "pattern",
    "glob",
    "session_id",
    "signal",
    "recursive",
    "tty",
];

/// Tools that only look at what the gateway has itself, and are asked again and again.
const UNRECORDED: [&str; 3] = ["list_environments", "list_processes", "read_output"];

/// The tool that ends a process; that is never refused for want of a record.
const ENDING: &str = "terminate";

/// Files of a patch that are named.
const PATCHED_MAX: usize = 64;

/// What a caller is about to do, as it is recorded.
pub(super) fn act(action: &'static str, caller: &Principal, headers: &HeaderMap) -> Act {
    Act::new(action).by(caller.workspace(), caller.user(), caller.credential()).asked_as(super::asked_as(headers))
}

/// The same in a process session.
pub(super) fn in_session(action: &'static str, caller: &Principal, headers: &HeaderMap, session: &Session) -> Act {
    act(action, caller, headers).in_session(session.id.as_str()).at(&session.environment).on(&session.executor())
}

/// Carries something out between the records of its beginning and its end.
///
/// # Errors
/// 503 `audit_unavailable`, and then it was not begun; those of the work.
pub(super) async fn recorded<T>(
    api: &Api,
    act: Act,
    work: impl Future<Output = Result<T, ApiError>>,
    ended: impl FnOnce(&T) -> Outcome,
) -> Result<T, ApiError> {
    let entry = api.audit.begin(act).await?;
    let result = work.await;
    entry.end(result.as_ref().map_or_else(failed, ended));
    result
}

/// Records that a tool is called, unless it is one that only looks; and says how many bytes its arguments have.
///
/// # Errors
/// 503 `audit_unavailable`; the call must not begin then.
pub(super) async fn tool_call(
    api: &Api,
    act: Act,
    tool: &'static Tool,
    arguments: &Value,
) -> Result<(Option<Entry>, u64), ApiError> {
    if UNRECORDED.contains(&tool.name()) {
        return Ok((None, 0));
    }
    let mut act = act.with_tool(tool.name()).about(details(arguments));
    if tool.name() == ENDING {
        act = act.always();
    }
    if api.audit.keeps_contents() {
        act = act.containing(arguments.clone());
    }
    Ok((Some(api.audit.begin(act).await?), bytes(arguments)))
}

/// Bytes of all texts in a value.
fn bytes(value: &Value) -> u64 {
    match value {
        Value::String(text) => text.len() as u64,
        Value::Array(items) => items.iter().map(bytes).sum(),
        Value::Object(fields) => fields.values().map(bytes).sum(),
        Value::Null | Value::Bool(_) | Value::Number(_) => 0,
    }
}

/// What is done, without what it is done with.
fn details(arguments: &Value) -> Value {
    let Some(arguments) = arguments.as_object() else { return json!({}) };
    let recorded = arguments.iter().filter(|(field, _)| RECORDED.contains(&field.as_str()));
    let mut details: Map<String, Value> = recorded.map(|(field, value)| (field.clone(), value.clone())).collect();
    if let Some(variables) = arguments.get("env").and_then(Value::as_object) {
        details.insert("env".into(), variables.keys().cloned().collect());
    }
    for field in ["patch", "input"] {
        if let Some(patch) = arguments.get(field).and_then(Value::as_str) {
            details.insert("files".into(), patched(patch).into());
        }
    }
    details.into()
}

/// The files that a patch names, in codex's format or as a unified diff. A line of content never begins like one of
/// these.
fn patched(patch: &str) -> Vec<&str> {
    const MARKS: [&str; 4] = ["*** Add File: ", "*** Update File: ", "*** Delete File: ", "*** Move to: "];
    let lines = patch.lines();
    let follows = lines.clone().scan("", |before, line| Some((std::mem::replace(before, line), line)));
    let named = follows.filter_map(|(before, line)| {
        let of_diff = before.starts_with("--- ").then(|| line.strip_prefix("+++ ")).flatten();
        MARKS.iter().find_map(|mark| line.strip_prefix(mark)).or(of_diff)
    });
    named.take(PATCHED_MAX).collect()
}

/// How a tool call ended. The bytes are those of the texts in its arguments, and of what it tells.
pub(super) fn outcome(result: &Result<ToolResult, ApiError>, bytes_in: u64) -> Outcome {
    match result {
        Ok(result) => {
            let structured = result.structured_content.as_ref();
            let code = match structured.and_then(|structured| structured["code"].as_str()) {
                _ if !result.is_error => "ok".into(),
                Some(code) => code.to_owned(),
                None => "failed".into(),
            };
            let text = |content: &Content| match content {
                Content::Text { text } => text.len() as u64,
            };
            let bytes_out = result.content.iter().map(text).sum();
            let exit_code = structured.and_then(|structured| structured["exit_code"].as_i64());
            Outcome::new(code).exit_code(exit_code).bytes(bytes_in, bytes_out)
        }
        Err(error) => failed(error).bytes(bytes_in, 0),
    }
}

/// How something ended that was refused.
pub(super) fn failed(error: &ApiError) -> Outcome {
    let outcome = Outcome::new(error.code());
    match error.ran() {
        Some(ran) => outcome.with("ran", json!(ran)),
        None => outcome,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn what_is_done_is_told_and_what_it_is_done_with_is_not() {
        let arguments = json!({
            "command": ["make", "-j2"], "cwd": "/src", "path": "a", "env": { "TOKEN": "s3cret" }, "content": "s3cret",
            "content_b64": "czNjcmV0", "chars": "s3cret", "stdin": "s3cret", "key": "s3cret", "ticket": "s3cret",
            "old": "s3cret", "new": "s3cret", "something_new": "s3cret", "timeout_ms": 5,
        });
        let details = details(&arguments);
        assert_eq!(details, json!({ "command": ["make", "-j2"], "cwd": "/src", "path": "a", "env": ["TOKEN"] }));
        assert_eq!(super::details(&json!("s3cret")), json!({}));
    }

    #[test]
    fn of_a_patch_only_the_files_are_told() {
        let codex = "*** Begin Patch\n*** Update File: a.rs\n*** Move to: b.rs\n@@ fn\n-s3cret\n+*** Add File: s3cret\n \
                     *** Delete File: s3cret\n--- s3cret\n*** Add File: c.rs\n+++ s3cret\n*** End Patch";
        assert_eq!(details(&json!({ "patch": codex })), json!({ "files": ["a.rs", "b.rs", "c.rs"] }));
        let diff = "--- a/x\n+++ b/x\n@@ -1 +1 @@\n-s3cret\n++++ s3cret\n";
        assert_eq!(details(&json!({ "patch": diff })), json!({ "files": ["b/x"] }));
        let many = "*** Add File: x\n".repeat(1000);
        assert_eq!(details(&json!({ "input": many }))["files"].as_array().unwrap().len(), PATCHED_MAX);
    }

    #[test]
    fn an_end_tells_code_exit_and_bytes() {
        assert_eq!(bytes(&json!({ "command": ["ls", "-l"], "cwd": "/", "timeout_ms": 5 })), 5);
        let of = |result: &Result<ToolResult, ApiError>| format!("{:?}", outcome(result, 7));
        let mut result = ToolResult::error("nope");
        assert!(of(&Ok(result.clone())).contains("\"failed\""));
        result.structured_content = Some(json!({ "code": "not_found" }));
        assert!(of(&Ok(result.clone())).contains("\"not_found\""));
        (result.is_error, result.structured_content) = (false, Some(json!({ "exit_code": 3 })));
        let text = of(&Ok(result));
        assert!(text.contains("\"ok\"") && text.contains("exit_code: Some(3)"), "{text}");
        assert!(text.contains("bytes_in: Some(7)") && text.contains("bytes_out: Some(4)"), "{text}");
        assert!(of(&Err(ApiError::new(404, "env_not_found", "s3cret"))).contains("\"env_not_found\""));
    }
}
