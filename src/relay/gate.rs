//! What the gateway looks at in the messages of a plain harness: where its requests begin and end, and the names of
//! executor sessions, which it replaces by names of its own.
//!
//! Owned by nobody: functions of one message. Everything they do not name passes as it is.

use bytes::Bytes;
use serde_json::{Map, Value, json};

use crate::protocol::rpc::{ExecutorSessionId, INVALID_REQUEST, Incoming, RequestId};

/// A message of a harness.
pub(super) enum Said {
    /// Asks for an executor session.
    Initialize {
        /// To be repeated in the answer.
        id: RequestId,
        /// The session to resume, by the name that the harness was given.
        resume: Option<String>,
    },
    /// Asks for something else.
    Request,
    /// Wants no answer: a notification, or an answer to the executor.
    Other,
    /// Cannot be read.
    Malformed,
}

/// What a harness says.
pub(super) fn said(json: &[u8]) -> Said {
    match Incoming::parse(json) {
        Ok(Incoming::Request { id, method, params }) if method == "initialize" => {
            let params = params.and_then(|params| serde_json::from_str::<Value>(params.get()).ok());
            let resume = params.and_then(|params| Some(params.get("resumeSessionId")?.as_str()?.to_owned()));
            Said::Initialize { id, resume }
        }
        Ok(Incoming::Request { .. }) => Said::Request,
        Ok(_) => Said::Other,
        Err(_) => Said::Malformed,
    }
}

/// The request to initialize with the executor's own name for the session.
pub(super) fn initialize(said: &Bytes, session: Option<&ExecutorSessionId>) -> Bytes {
    let Some(session) = session else { return said.clone() };
    let mut request: Value = serde_json::from_slice(said).unwrap_or_default();
    request["params"]["resumeSessionId"] = json!(session.reveal());
    request.to_string().into()
}

/// The executor's answer with another name for the session, and the session; `None` when it is a refusal.
pub(super) fn initialized(
    answer: &[u8],
    name: &(dyn Fn(&ExecutorSessionId) -> String + Send + Sync),
) -> Option<(Bytes, Option<ExecutorSessionId>)> {
    let Ok(Incoming::Response { id, result }) = Incoming::parse(answer) else { return None };
    let mut members: Map<String, Value> = serde_json::from_str(result.get()).ok()?;
    // Older executors give none.
    let session = members.get("sessionId").and_then(Value::as_str).map(ExecutorSessionId::new);
    if let Some(session) = &session {
        members.insert("sessionId".into(), Value::String(name(session)));
    }
    let answer = json!({ "id": id, "result": members });
    Some((answer.to_string().into(), session))
}

/// Whether the executor answers a request. Its notifications, which are the most by far, are told by their first bytes.
pub(super) fn is_answer(json: &[u8]) -> bool {
    !json.starts_with(br#"{"method":"#)
        && matches!(Incoming::parse(json), Ok(Incoming::Response { .. } | Incoming::Error { .. }))
}

/// Whether the executor takes the session that is to be resumed for attached to another conversation.
pub(super) fn is_attached(answer: &[u8]) -> bool {
    matches!(Incoming::parse(answer), Ok(Incoming::Error { error, .. }) if error.is_attached())
}

/// Tells a harness that its request is refused.
pub(super) fn error(id: &RequestId, code: i64, message: &str) -> Bytes {
    json!({ "error": { "code": code, "message": message }, "id": id }).to_string().into()
}

/// Tells a harness that its message cannot be read, as a local executor does (codex-exec-server.md §5).
pub(super) fn malformed() -> Bytes {
    error(&RequestId::Number(-1), INVALID_REQUEST, "the message is not JSON-RPC")
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn the_name_of_a_session_is_replaced_both_ways_and_all_else_stays() {
        let request = br#"{"id":"i","method":"initialize","params":{"clientName":"x","resumeSessionId":"mine"}}"#;
        let Said::Initialize { id, resume } = said(request) else { panic!("an initialize") };
        assert_eq!((id, resume.as_deref()), (RequestId::Text("i".into()), Some("mine")));
        let sent = initialize(&Bytes::from_static(request), Some(&ExecutorSessionId::new("theirs")));
        let sent: Value = serde_json::from_slice(&sent).unwrap();
        assert_eq!(sent["params"], json!({ "clientName": "x", "resumeSessionId": "theirs" }));

        let answer = br#"{"id":"i","result":{"sessionId":"theirs","environmentInfo":{"cwd":"file:///"}}}"#;
        let (told, session) = initialized(answer, &|session| format!("sealed {}", session.reveal())).unwrap();
        let told: Value = serde_json::from_slice(&told).unwrap();
        let result = json!({ "sessionId": "sealed theirs", "environmentInfo": { "cwd": "file:///" } });
        assert_eq!(told, json!({ "id": "i", "result": result }));
        assert_eq!(session.unwrap().reveal(), "theirs");
    }

    #[test]
    fn a_refusal_and_a_session_without_a_name_are_told_apart() {
        let refusal = br#"{"error":{"code":-32010,"message":"attached"},"id":1}"#;
        assert!(initialized(refusal, &|_| unreachable!()).is_none());
        assert!(is_attached(refusal) && !is_attached(br#"{"error":{"code":-32600,"message":""},"id":1}"#));
        let nameless = initialized(br#"{"id":1,"result":{}}"#, &|_| unreachable!()).unwrap();
        assert!(nameless.1.is_none());
    }

    #[test]
    fn messages_are_told_apart_by_their_shape() {
        assert!(matches!(said(br#"{"id":1,"method":"process/read","params":{}}"#), Said::Request));
        assert!(matches!(said(br#"{"method":"initialized"}"#), Said::Other));
        assert!(matches!(said(br#"{"id":1,"result":{}}"#), Said::Other));
        assert!(matches!(said(b"{"), Said::Malformed));
        assert!(is_answer(br#"{"id":1,"result":null}"#) && is_answer(br#"{"error":{"code":1},"id":-1}"#));
        for other in [&br#"{"method":"process/output","params":{}}"#[..], br#"{"id":1,"method":"m"}"#, b"{"] {
            assert!(!is_answer(other));
        }
    }
}
