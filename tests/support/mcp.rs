//! An MCP client over streamable HTTP: plain requests, answers as JSON whichever way they come.

use std::sync::atomic::{AtomicU64, Ordering};

use serde_json::{Value, json};

use super::{Answer, Caller};

/// What every client of the transport accepts.
pub const ACCEPT: (&str, &str) = ("accept", "application/json, text/event-stream");

/// A client that has introduced itself.
pub struct Mcp {
    pub caller: Caller,
    /// What the gateway said of itself.
    pub greeting: Value,
    /// The name that it was given.
    pub session: String,
    version: String,
    ids: AtomicU64,
}

impl Mcp {
    pub async fn connect(caller: &Caller) -> Self {
        Self::of_version(caller, "2025-06-18").await
    }

    /// A client of that protocol revision.
    pub async fn of_version(caller: &Caller, version: &str) -> Self {
        let client = json!({ "name": "test", "version": "1" });
        let hello = json!({ "protocolVersion": version, "capabilities": {}, "clientInfo": client });
        let hello = json!({ "jsonrpc": "2.0", "id": "hello", "method": "initialize", "params": hello });
        let answer = post(caller, &[], &hello).await;
        assert_eq!(answer.status, 200, "{answer:?}");
        let (greeting, session) =
            (answer.json()["result"].clone(), answer.header("mcp-session-id").unwrap().to_owned());
        let version = greeting["protocolVersion"].as_str().unwrap().to_owned();
        let client = Self { caller: caller.clone(), greeting, session, version, ids: AtomicU64::new(0) };
        let accepted = client.notify("notifications/initialized", json!({})).await;
        assert_eq!(accepted.status, 202, "{accepted:?}");
        client
    }

    /// A notification, and how it was taken.
    pub async fn notify(&self, method: &str, params: Value) -> Answer {
        let message = json!({ "jsonrpc": "2.0", "method": method, "params": params });
        post(&self.caller, &self.headers(), &message).await
    }

    /// The answer to a request, whether result or error, and the notifications before it.
    pub async fn ask(&self, method: &str, params: Value) -> (Value, Vec<Value>) {
        let id = self.ids.fetch_add(1, Ordering::Relaxed);
        self.ask_as(id, method, params).await
    }

    /// The same under an id of the test's choice.
    pub async fn ask_as(&self, id: u64, method: &str, params: Value) -> (Value, Vec<Value>) {
        let message = json!({ "jsonrpc": "2.0", "id": id, "method": method, "params": params });
        let answer = post(&self.caller, &self.headers(), &message).await;
        assert!(answer.status.is_success(), "{answer:?}");
        let mut messages = messages(&answer);
        let last = messages.pop().expect("a request is answered");
        assert_eq!(last["id"], id, "{last}");
        (last, messages)
    }

    /// A request's result.
    pub async fn result(&self, method: &str, params: Value) -> Value {
        let (answer, _) = self.ask(method, params).await;
        assert!(answer["error"].is_null(), "{answer}");
        answer["result"].clone()
    }

    /// A tool's result.
    pub async fn call(&self, tool: &str, arguments: Value) -> Value {
        self.result("tools/call", json!({ "name": tool, "arguments": arguments })).await
    }

    /// The names of the tools that it may call.
    pub async fn tools(&self) -> Vec<String> {
        let listed = self.result("tools/list", json!({})).await;
        listed["tools"].as_array().unwrap().iter().map(|tool| tool["name"].as_str().unwrap().to_owned()).collect()
    }

    fn headers(&self) -> [(&str, &str); 2] {
        [("mcp-session-id", &self.session), ("mcp-protocol-version", &self.version)]
    }
}

/// One message, without an introduction.
pub async fn post(caller: &Caller, headers: &[(&str, &str)], message: &Value) -> Answer {
    let headers = [&[ACCEPT, ("content-type", "application/json")], headers].concat();
    caller.send("POST", "/mcp", &headers, message.to_string()).await
}

/// The messages of an answer, whether it is one or a stream of events.
pub fn messages(answer: &Answer) -> Vec<Value> {
    if answer.header("content-type").is_some_and(|value| value.starts_with("application/json")) {
        return vec![answer.json()];
    }
    let text = String::from_utf8_lossy(&answer.body);
    let data = text.lines().filter_map(|line| line.strip_prefix("data:")).map(str::trim);
    data.filter(|data| !data.is_empty()).map(|data| serde_json::from_str(data).unwrap()).collect()
}
