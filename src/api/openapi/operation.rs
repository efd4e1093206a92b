//! One operation as it is told: who may call it with what, and what may come back. Put together in `routes`.

use std::collections::BTreeMap;

use hyper::Method;
use serde_json::{Map, Value, json};

use super::failures::{ANY, Failures, PATH};
use super::reference;
use crate::edge::router::{Envelope, Row};

/// What an operation is about.
#[derive(Debug, Clone, Copy)]
pub(super) enum Tag {
    Environments,
    Files,
    Processes,
    Executors,
    Harnesses,
    Services,
    Transfers,
    Mcp,
    Gateway,
}

impl Tag {
    const ALL: &'static [(Self, &'static str, &'static str)] = &[
        (Self::Environments, "environments", "Remote machines of a workspace, and the tools that run on them."),
        (Self::Files, "files", "Files of any size over plain HTTP."),
        (Self::Processes, "processes", "Processes that outlive the call that started them, with their output."),
        (Self::Executors, "executors", "What executors call: register, validate, dial."),
        (Self::Harnesses, "harnesses", "What those call that speak with an executor themselves."),
        (Self::Services, "services", "What services call that were built around the original gateway."),
        (Self::Transfers, "transfers", "Bytes from one HTTP client to another."),
        (Self::Mcp, "mcp", "The tools for clients of the Model Context Protocol."),
        (Self::Gateway, "gateway", "The gateway itself."),
    ];

    fn name(self) -> &'static str {
        Self::ALL[self as usize].1
    }
}

/// The tags of the document.
pub(super) fn tags() -> Value {
    Tag::ALL.iter().map(|(_, name, about)| json!({ "name": name, "description": about })).collect()
}

/// A kind of credential.
#[derive(Debug, Clone, Copy)]
pub(super) enum Caller {
    Token,
    TokenInQuery,
    TokenInProtocol,
    ExecutorToken,
    ExecutorSignature,
    ExecutorTicket,
    SharedSecret,
    InternalSecret,
    TransferTicket,
}

/// A caller's token where headers can be set.
pub(super) const CALLER: &[Caller] = &[Caller::Token];

/// A caller's token at the doors that browsers use.
pub(super) const STREAM: &[Caller] = &[Caller::Token, Caller::TokenInQuery, Caller::TokenInProtocol];

impl Caller {
    const ALL: &'static [(Self, &'static str)] = &[
        (Self::Token, "callerToken"),
        (Self::TokenInQuery, "callerTokenInQuery"),
        (Self::TokenInProtocol, "callerTokenInProtocol"),
        (Self::ExecutorToken, "executorToken"),
        (Self::ExecutorSignature, "executorSignature"),
        (Self::ExecutorTicket, "executorTicket"),
        (Self::SharedSecret, "sharedSecret"),
        (Self::InternalSecret, "internalSecret"),
        (Self::TransferTicket, "transferTicket"),
    ];

    fn name(self) -> &'static str {
        Self::ALL[self as usize].1
    }

    /// All kinds as the document tells them.
    pub(super) fn schemes() -> Value {
        Self::ALL.iter().map(|(caller, name)| ((*name).to_owned(), caller.scheme())).collect::<Map<_, _>>().into()
    }

    fn scheme(self) -> Value {
        let bearer = |about: &str| json!({ "type": "http", "scheme": "bearer", "description": about });
        let key = |place: &str, name: &str, about: &str| json!({ "type": "apiKey", "in": place, "name": name, "description": about });
        match self {
            Self::Token => bearer("A proxy token or a cap-token of a workspace."),
            Self::TokenInQuery => key("query", "token", "The same, for clients that cannot set headers."),
            Self::TokenInProtocol => {
                key("header", "Sec-WebSocket-Protocol", "The same as sub-protocol `bearer.TOKEN`, for browsers.")
            }
            Self::ExecutorToken => {
                bearer("The token of an executor, or what the service at `auth.upstream_url` knows.")
            }
            Self::ExecutorSignature => json!({
                "type": "http", "scheme": "AWS4-HMAC-SHA256",
                "description": "AWS SigV4: key id is the executor's id, secret its token; any region and service.",
            }),
            Self::ExecutorTicket => key("query", "token", "The ticket in the URL that a register has answered."),
            Self::SharedSecret => {
                bearer("`auth.shared_secret` of the configuration; without it there is no such path.")
            }
            Self::InternalSecret => {
                let about = "`auth.internal_secret` of the configuration; without it there is no such path.";
                key("header", "X-Internal-Secret", about)
            }
            Self::TransferTicket => bearer("The ticket of the path itself."),
        }
    }
}

/// Headers of answers that several operations have.
pub(super) fn headers() -> Value {
    let text = |about: &str| json!({ "description": about, "schema": { "type": "string" } });
    json!({
        "RequestId": text("Names this request, also in the logs and the audit."),
        "RetryAfter": {
            "description": "Seconds after which another try is worthwhile.",
            "schema": { "type": "integer", "minimum": 1 },
        },
        "ServerTiming": text("Where the time went; behind an answer that came in pieces, a trailer."),
        "ETag": text("The content: another content has another one."),
        "AcceptRanges": text("`bytes`, where the size is known."),
        "ContentRange": text("Which bytes of how many."),
        "Challenge": text("Where to learn how to come by a token (RFC 9728)."),
        "Rejection": text("Why an executor is to register again."),
        "Upgrade": text("`websocket`"),
        "McpSessionId": text("The client's name from `initialize` on, by which it can cancel its calls."),
    })
}

/// A body in one of its forms.
#[derive(Debug, Clone, PartialEq)]
struct Content {
    media_type: &'static str,
    schema: Value,
}

/// Everything that comes with one status.
#[derive(Debug, Clone, Default)]
struct Answer {
    words: Vec<String>,
    headers: Vec<(&'static str, &'static str)>,
    contents: Vec<Content>,
}

/// One operation.
#[derive(Debug, Clone)]
pub(super) struct Operation {
    tag: Tag,
    callers: &'static [Caller],
    words: &'static str,
    parameters: Vec<Value>,
    forms: Vec<(&'static str, Value)>,
    body: Option<Value>,
    answers: BTreeMap<u16, Answer>,
    failures: BTreeMap<u16, Vec<&'static str>>,
}

impl Operation {
    /// One about `tag`, for whoever shows one of these credentials; for anybody where there is none.
    pub(super) fn new(tag: Tag, callers: &'static [Caller]) -> Self {
        let (parameters, forms, body) = (Vec::new(), Vec::new(), None);
        let (answers, failures) = (BTreeMap::new(), BTreeMap::new());
        Self { tag, callers, words: "", parameters, forms, body, answers, failures }.fails(&[ANY])
    }

    /// What is to be known beyond the sentence of the table.
    pub(super) fn says(mut self, words: &'static str) -> Self {
        self.words = words;
        self
    }

    fn parameter(mut self, place: &str, name: &str, schema: Value, about: &str) -> Self {
        self.parameters.push(json!({ "in": place, "name": name, "schema": schema, "description": about }));
        self
    }

    /// A parameter of the query that may be there.
    pub(super) fn query(self, name: &str, schema: Value, about: &str) -> Self {
        self.parameter("query", name, schema, about)
    }

    /// A parameter of the query that has to be there.
    pub(super) fn needs(self, name: &str, schema: Value, about: &str) -> Self {
        let mut operation = self.parameter("query", name, schema, about);
        if let Some(parameter) = operation.parameters.last_mut() {
            parameter["required"] = true.into();
        }
        operation
    }

    /// A header that may be there.
    pub(super) fn header(self, name: &str, schema: Value, about: &str) -> Self {
        self.parameter("header", name, schema, about)
    }

    /// The form of a parameter of the path, where another one is refused for it.
    pub(super) fn path(mut self, name: &'static str, schema: Value) -> Self {
        self.forms.push((name, schema));
        self
    }

    /// A body of JSON that has to be there.
    pub(super) fn takes(mut self, schema: &Value) -> Self {
        self.body = Some(json!({ "required": true, "content": { "application/json": { "schema": schema } } }));
        self
    }

    /// A body of JSON that may be left out.
    pub(super) fn may_take(mut self, schema: &Value) -> Self {
        self.body = Some(json!({ "content": { "application/json": { "schema": schema } } }));
        self
    }

    /// A body of any bytes.
    pub(super) fn takes_bytes(mut self) -> Self {
        self.body = Some(json!({ "required": true, "content": { "application/octet-stream": {} } }));
        self
    }

    /// An answer without a body.
    pub(super) fn answers(mut self, status: u16, words: &str) -> Self {
        self.answers.entry(status).or_default().words.push(words.to_owned());
        self
    }

    /// An answer of JSON.
    pub(super) fn answers_json(self, status: u16, words: &str, schema: Value) -> Self {
        self.answers(status, words).content(status, "application/json", schema)
    }

    /// An answer of another media type.
    pub(super) fn answers_as(self, status: u16, media_type: &'static str, words: &str) -> Self {
        let is_text = media_type.starts_with("text/");
        self.answers(status, words).content(
            status,
            media_type,
            if is_text { json!({ "type": "string" }) } else { json!({}) },
        )
    }

    fn content(mut self, status: u16, media_type: &'static str, schema: Value) -> Self {
        let content = Content { media_type, schema };
        let contents = &mut self.answers.entry(status).or_default().contents;
        if !contents.contains(&content) {
            contents.push(content);
        }
        self
    }

    /// A header of an answer, by its name among the common ones.
    pub(super) fn with(mut self, status: u16, name: &'static str, common: &'static str) -> Self {
        self.answers.entry(status).or_default().headers.push((name, common));
        self
    }

    /// A switch to WebSocket.
    pub(super) fn opens(self, words: &str) -> Self {
        self.answers(101, words).with(101, "Upgrade", "Upgrade")
    }

    /// What may go wrong.
    pub(super) fn fails(mut self, lists: &[Failures]) -> Self {
        for (status, code) in lists.iter().copied().flatten() {
            let codes = self.failures.entry(*status).or_default();
            if !codes.contains(code) {
                codes.push(code);
                codes.sort_unstable();
            }
        }
        self
    }

    /// The operation as it stands in the document, below one of its row's paths and methods.
    pub(super) fn told(&self, row: &Row, alias: usize, path: &str, method: &Method) -> Value {
        let mut operation = self.clone();
        let names: Vec<&str> = path.split('/').filter_map(|part| part.strip_prefix('{')?.strip_suffix('}')).collect();
        if !names.is_empty() {
            operation = operation.fails(&[PATH]);
        }
        for (status, codes) in std::mem::take(&mut operation.failures) {
            operation = operation.failed(row.envelope, status, &codes);
        }
        let is_head = *method == Method::HEAD;
        let responses: Map<String, Value> = operation
            .answers
            .iter()
            .map(|(status, answer)| (status.to_string(), answer.told(*status, row.timed_door.is_some(), is_head)))
            .collect();
        let mut parameters: Vec<Value> = names.iter().map(|name| self.path_parameter(name)).collect();
        parameters.append(&mut operation.parameters);
        // An alias, and a second method, are operations of their own.
        let mut id = row.name.to_owned();
        if is_head {
            id.push_str("_head");
        }
        if alias > 0 {
            id.push_str(&format!("_{}", alias + 1));
        }
        let callers = self.callers.iter().map(|caller| json!({ caller.name(): [] }));
        let mut told = json!({
            "operationId": id,
            "tags": [self.tag.name()],
            "summary": row.about.trim().trim_end_matches('.'),
            "security": callers.collect::<Vec<_>>(),
            "parameters": parameters,
            "responses": responses,
        });
        if !self.words.is_empty() {
            told["description"] = self.words.into();
        }
        if let Some(body) = operation.body {
            told["requestBody"] = body;
        }
        told
    }

    fn path_parameter(&self, name: &str) -> Value {
        let about = match name {
            "name" => "The environment, by the workspace's name for it.",
            "sid" => "The process session.",
            "wid" => "The workspace.",
            "registration" => "The registration of the executor.",
            "ticket" => "The transfer.",
            _ => "The executor.",
        };
        let form = self.forms.iter().find(|(of, _)| *of == name).map(|(_, schema)| schema.clone());
        let schema = form.unwrap_or_else(|| json!({ "type": "string", "minLength": 1 }));
        json!({ "in": "path", "name": name, "required": true, "schema": schema, "description": about })
    }

    fn failed(self, envelope: Envelope, status: u16, codes: &[&str]) -> Self {
        let listed: Vec<String> = codes.iter().map(|code| format!("`{code}`")).collect();
        let operation = self.answers(status, &listed.join(", "));
        match envelope {
            Envelope::Json => {
                let code = json!({ "properties": { "error": { "properties": { "code": { "enum": codes } } } } });
                operation.content(status, "application/json", json!({ "allOf": [reference("ErrorBody"), code] }))
            }
            Envelope::Message => operation.content(status, "application/json", reference("MessageError")),
            Envelope::Rpc => operation.content(status, "application/json", reference("RpcError")),
            Envelope::Text => operation.content(status, "text/plain", json!({ "type": "string" })),
        }
    }
}

impl Answer {
    fn told(&self, status: u16, is_timed: bool, is_head: bool) -> Value {
        let common = |name: &str| json!({ "$ref": format!("#/components/headers/{name}") });
        let mut headers = json!({ "X-Request-Id": common("RequestId") });
        if is_timed {
            headers["Server-Timing"] = common("ServerTiming");
        }
        if matches!(status, 429 | 503) {
            headers["Retry-After"] = common("RetryAfter");
        }
        for (name, of) in &self.headers {
            headers[*name] = common(of);
        }
        let mut told = json!({ "description": self.words.join(", or: "), "headers": headers });
        let mut media_types: BTreeMap<&str, Vec<&Value>> = BTreeMap::new();
        for content in &self.contents {
            media_types.entry(content.media_type).or_default().push(&content.schema);
        }
        if !is_head && !media_types.is_empty() {
            let contents = media_types.into_iter().map(|(media_type, schemas)| {
                let schema = if let [only] = &schemas[..] { (*only).clone() } else { json!({ "anyOf": schemas }) };
                (media_type.to_owned(), json!({ "schema": schema }))
            });
            told["content"] = contents.collect::<Map<_, _>>().into();
        }
        told
    }
}
