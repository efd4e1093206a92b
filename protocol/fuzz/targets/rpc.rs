//! Whatever is read as a message is written and read again as the same message, and so are its parameters.

use exec_gateway_protocol::path::FileUri;
use exec_gateway_protocol::rpc::{self, Incoming, RequestId};
use serde_json::value::RawValue;

pub fn run(input: &[u8]) {
    if let Some(uri) = std::str::from_utf8(input).ok().and_then(|text| FileUri::parse(text).ok()) {
        assert_eq!(FileUri::parse(uri.as_str()), Ok(uri.clone()));
        drop(uri.to_native());
    }
    let whole = serde_json::from_slice::<serde_json::Value>(input);
    assert_eq!(
        rpc::check(input).is_ok(),
        whole.is_ok(),
        "what is checked can be read as a value, and nothing else can"
    );
    let Ok(message) = Incoming::parse(input) else { return };
    let written = match &message {
        Incoming::Response { id, result } => rpc::encode_response(id, result),
        Incoming::Error { id, error } => rpc::encode_error(id, error),
        Incoming::Notification { method, params: Some(params) } => rpc::encode_notification(method, params),
        Incoming::Request { id: RequestId::Number(id), method, params: Some(params) } => {
            rpc::encode_request(*id, method, params, None)
        }
        // Nothing here writes requests with text ids, or without parameters.
        Incoming::Notification { params: None, .. } | Incoming::Request { .. } => return,
    };
    let again = Incoming::parse(&written).expect("what was written can be read");
    assert_eq!(parts(&again), parts(&message));

    let (.., Some(body)) = parts(&message) else { return };
    if let Ok(output) = serde_json::from_str::<rpc::ProcessOutput>(body) {
        let json = serde_json::to_string(&output).expect("output can be written");
        assert_eq!(serde_json::from_str::<rpc::ProcessOutput>(&json).expect("and read again"), output);
    }
    if let Ok(start) = serde_json::from_str::<rpc::ProcessStart>(body) {
        let json = serde_json::to_string(&start).expect("parameters can be written");
        assert_eq!(serde_json::from_str::<rpc::ProcessStart>(&json).expect("and read again"), start);
    }
    drop(serde_json::from_str::<rpc::Initialized>(body));
}

/// Id, method or error, and body.
fn parts<'a>(message: &'a Incoming<'a>) -> (Option<&'a RequestId>, String, Option<&'a str>) {
    let text = |value: &Option<&'a RawValue>| value.map(RawValue::get);
    match message {
        Incoming::Response { id, result } => (Some(id), String::new(), Some(result.get())),
        Incoming::Error { id, error } => (Some(id), error.to_string(), None),
        Incoming::Notification { method, params } => (None, method.to_string(), text(params)),
        Incoming::Request { id, method, params } => (Some(id), method.to_string(), text(params)),
    }
}
