//! Another workspace's ids at every route: what is answered is what an unknown id gets, byte for byte.
//!
//! A route of the router's table that is not in [`asks`] does not compile.

use exec_gateway::admin::{Request, Response};
use exec_gateway::edge::router::{Route, TABLE};
use exec_gateway::protocol::compat::CreatedTransfer;
use exec_gateway::protocol::ids::{ExecutorId, WorkspaceId};
use exec_gateway::protocol::rest::{HarnessKey, KeyBytes};
use exec_gateway::tools::Tool;
use hyper::HeaderMap;
use serde_json::{Value, json};

use crate::support::mcp::ACCEPT;
use crate::support::{Answer, Caller, Credentials, FakeExecutor, Signer, TestGateway, Workbench};

const SHARED_SECRET: &str = "shared-secret-of-this-test-0001";

/// What names something of one workspace, each of a length of its own kind.
#[derive(Debug, Clone)]
struct Ids {
    workspace: String,
    environment: String,
    executor: String,
    registration: String,
    /// What an executor dials with.
    link_ticket: String,
    session: String,
    transfer: String,
    turn: String,
}

impl Ids {
    fn all(&self) -> [&str; 8] {
        let Self { workspace, environment, executor, registration, link_ticket, session, transfer, turn } = self;
        [workspace, environment, executor, registration, link_ticket, session, transfer, turn].map(String::as_str)
    }

    /// The text with these ids in the place of the others.
    fn instead_of(&self, others: &Self, text: &str) -> String {
        // The workspace is a letter, of which words are made; no answer names it.
        let mut pairs: Vec<_> = others.all().into_iter().zip(self.all()).skip(1).collect();
        // An executor's id is a part of its ticket.
        pairs.sort_by_key(|(theirs, _)| std::cmp::Reverse(theirs.len()));
        pairs.into_iter().fold(text.to_owned(), |text, (theirs, unknown)| text.replace(theirs, unknown))
    }
}

/// What of our own a request may need besides the other's ids.
struct Ours {
    environment: String,
    executor: Credentials,
    registration: String,
    link_ticket: String,
}

/// A request that names an id.
struct Ask {
    /// Behind the route's path: a query.
    query: String,
    headers: Vec<(&'static str, String)>,
    body: String,
    /// The status for another workspace's id, and for an unknown one.
    statuses: (u16, u16),
}

impl Ask {
    fn alike(status: u16, body: Value) -> Self {
        let body = if body.is_null() { String::new() } else { body.to_string() };
        Self { query: String::new(), headers: Vec::new(), body, statuses: (status, status) }
    }

    fn with(mut self, name: &'static str, value: impl Into<String>) -> Self {
        self.headers.push((name, value.into()));
        self
    }

    fn query(self, query: impl Into<String>) -> Self {
        Self { query: query.into(), ..self }
    }

    fn but(self, status: u16) -> Self {
        Self { statuses: (status, self.statuses.1), ..self }
    }

    /// A WebSocket handshake.
    fn socket(status: u16) -> Self {
        let ask = Self::alike(status, Value::Null).with("connection", "upgrade").with("upgrade", "websocket");
        ask.with("sec-websocket-version", "13").with("sec-websocket-key", "dGhlIHNhbXBsZSBub25jZQ==")
    }
}

/// How each route is asked for somebody else's, with our own credentials.
fn asks(route: Route, ids: &Ids, ours: &Ours) -> Vec<Ask> {
    let tool = |name: &str, arguments: Value| json!({ "tool": name, "arguments": arguments });
    let bearer = |token: &str| format!("Bearer {token}");
    match route {
        // Whatever is there of theirs is not told: the answers are compared with what they are, and searched for it.
        Route::EnvList | Route::ProcessList | Route::Connected => vec![Ask::alike(200, json!({}))],
        Route::ToolCall => Tool::ALL.iter().map(|named| Ask::alike(404, tool(named.name(), json!({})))).collect(),
        Route::FileGet => vec![Ask::alike(404, Value::Null).query("?path=x")],
        Route::FilePut => vec![Ask::alike(404, json!("content")).query("?path=x")],
        Route::ProcessShow | Route::ProcessForget => vec![Ask::alike(404, Value::Null)],
        Route::ProcessOutput => vec![
            Ask::alike(404, Value::Null),
            Ask::alike(404, Value::Null).query("?view=head_tail"),
            Ask::alike(404, Value::Null).with("accept", "text/event-stream"),
        ],
        Route::ProcessAttach => vec![Ask::alike(404, Value::Null), Ask::socket(404)],
        Route::ProcessStdin => vec![Ask::alike(404, json!({ "data_b64": "eA==" }))],
        Route::ProcessTerminate => vec![Ask::alike(404, json!({}))],
        // As an executor of ours, whose token is good for itself alone; what an upstream knows: `registration`.
        Route::RegisterCodex | Route::RegisterAgentx => {
            vec![Ask::alike(401, json!({})).with("authorization", bearer(&ours.executor.token))]
        }
        // Signed for each path where the request is sent.
        Route::RegisterDirect => vec![Ask::alike(401, json!({ "transport": "direct_jsonrpc_v1" }))],
        Route::Validate => {
            let body = |registration: &str| {
                let authorization = "h1.x.y";
                json!({
                    "executor_registration_id": registration,
                    "harness_public_key": key(),
                    "harness_key_authorization": authorization,
                })
            };
            let of_ours = |body: Value| Ask::alike(200, body).with("authorization", bearer(&ours.executor.token));
            vec![
                of_ours(body(&ours.registration)),
                // Who knows an executor's registration has seen its URL, and is told that the token is not its own.
                of_ours(body(&ids.registration)).but(401),
            ]
        }
        Route::Connect => vec![Ask::alike(403, json!({ "harness_public_key": key() }))],
        Route::Bridge => vec![
            Ask::socket(403),
            Ask::alike(426, Value::Null),
            // As an executor of ours with its own ticket.
            Ask::socket(404).query(format!("?token={}&reg={}", ours.link_ticket, ids.registration)),
            Ask::socket(404).query(format!("?token={}&reg={}", ours.link_ticket, ours.registration)),
        ],
        Route::CloudRelay => vec![Ask::socket(403), Ask::socket(404).query(format!("?token={}", ours.link_ticket))],
        // For services: a caller's credential is none here, whatever it names.
        Route::RevokeTurn => vec![Ask::alike(401, json!({ "turn_id": ids.turn }))],
        Route::ExecutorRegister | Route::ExecutorDelete | Route::ExecutorsBound | Route::ExecutorUnbind => {
            vec![Ask::alike(401, json!({})).with("x-internal-secret", "no-secret")]
        }
        Route::ExecutorBind => vec![Ask::alike(401, json!({ "exe_id": ids.executor, "name": "mine" }))],
        Route::Mcp => {
            let call = |tool: &str, arguments: Value| {
                let params = json!({ "name": tool, "arguments": arguments });
                let message = json!({ "jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": params });
                let ask = Ask::alike(200, message).with("content-type", "application/json").with(ACCEPT.0, ACCEPT.1);
                ask.with("mcp-session-id", &ids.session)
            };
            let at = Tool::ALL.iter().filter(|tool| tool.needs_environment());
            let mut asks: Vec<_> =
                at.map(|tool| call(tool.name(), json!({ "environment_id": ids.environment }))).collect();
            asks.extend(
                ["write_stdin", "read_output", "terminate"]
                    .map(|tool| call(tool, json!({ "session_id": ids.session }))),
            );
            let copy = |from: &str, to: &str| {
                let (from_path, to_path) = ("/a", "/b");
                json!({
                    "source_environment_id": from, "source_path": from_path,
                    "destination_environment_id": to, "destination_path": to_path,
                })
            };
            asks.push(call("copy_path", copy(&ids.environment, &ours.environment)));
            asks.push(call("copy_path", copy(&ours.environment, &ids.environment)));
            asks.push(call("list_environments", json!({})));
            asks.push(call("list_processes", json!({})));
            asks
        }
        Route::TransferCreate => {
            let body = |workspace: &str, from: &str, to: &str| json!({ "workspace_id": workspace, "source_exe_id": from, "dest_exe_id": to });
            let own = ours.executor.executor.as_str();
            vec![
                Ask::alike(403, body(&ids.workspace, &ids.executor, &ids.executor)),
                Ask::alike(403, body("ours", own, &ids.executor)),
                Ask::alike(403, body("ours", &ids.executor, own)),
                Ask::alike(403, body(&ids.workspace, own, own)),
            ]
        }
        Route::TransferPut => vec![Ask::alike(404, json!("content"))],
        Route::TransferGet => vec![Ask::alike(404, Value::Null)],
        // They tell the same to everybody.
        Route::ProtectedResource | Route::Health | Route::OpenApi => vec![Ask::alike(200, Value::Null)],
    }
}

/// Everything of an answer but what names the request and its time.
fn told(answer: &Answer) -> (u16, HeaderMap) {
    let mut headers = answer.headers.clone();
    for name in ["date", "x-request-id"] {
        headers.remove(name);
    }
    // Times differ; that they are told does not.
    if let Some(timing) = headers.get_mut("server-timing") {
        *timing = "some".parse().unwrap();
    }
    (answer.status.as_u16(), headers)
}

#[tokio::test(flavor = "multi_thread")]
async fn ids_of_another_workspace_are_answered_as_unknown_ones_at_every_route() {
    let bench = Workbench::with(|config| {
        config.auth.shared_secret = Some(exec_gateway::config::Secret::new(SHARED_SECRET.to_owned()));
        config.auth.internal_secret = Some(exec_gateway::config::Secret::new("internal-secret-of-this-test-01".into()));
    })
    .await;
    let gateway = &bench.gateway;
    let theirs = theirs(&bench).await;
    let unknown = Ids {
        workspace: "v".into(),
        environment: "b0x".into(),
        executor: format!("exe_{}", uuid::Uuid::new_v4()),
        registration: format!("exr_{}", uuid::Uuid::new_v4()),
        link_ticket: theirs.link_ticket.chars().rev().collect(),
        session: uuid::Uuid::new_v4().to_string(),
        transfer: theirs.transfer[..4].to_owned() + &theirs.transfer[4..].chars().rev().collect::<String>(),
        turn: "turn-0".into(),
    };
    let lengths = |ids: &Ids| ids.all().map(str::len);
    assert_eq!(lengths(&theirs), lengths(&unknown), "nothing is told apart by its length");

    let (caller, executor, _link) = with_executor(gateway).await;
    let ours = Ours {
        environment: "mine".into(),
        registration: registration(&caller, &executor.executor).await,
        link_ticket: link_ticket(gateway, &executor.executor),
        executor,
    };
    let (workspace, ttl) = (WorkspaceId::new("ours").unwrap(), std::time::Duration::from_secs(600));
    let mint = Request::CapToken { workspace, turn: Some("turn-ours".parse().unwrap()), user: None, ttl };
    let Response::CapToken { token } = gateway.admin(mint).await else { panic!("no cap-token") };
    let callers = [caller, Caller::new(gateway.address(), Some(token.expose().to_owned()))];

    let (mut asked, mut faults) = (0, Vec::new());
    for row in TABLE {
        for (path, method) in row.paths.iter().flat_map(|path| row.methods.iter().map(move |method| (path, method))) {
            let pairs = asks(row.route, &theirs, &ours).into_iter().zip(asks(row.route, &unknown, &ours));
            for (foreign, unheard) in pairs {
                for caller in &callers {
                    let what = format!("{method} {path}{} {}", foreign.query, foreign.body);
                    let send = async |ask: &Ask, ids: &Ids| {
                        let path = in_path(path, ids) + &ask.query;
                        send(caller, method.as_str(), &path, ask, row.route, &ours).await
                    };
                    let answers = (send(&foreign, &theirs).await, send(&unheard, &unknown).await);
                    let statuses = (answers.0.status.as_u16(), answers.1.status.as_u16());
                    asked += 1;
                    let text = |answer: &Answer| String::from_utf8(answer.body.to_vec()).unwrap();
                    let alike = || {
                        told(&answers.0) == told(&answers.1)
                            && unknown.instead_of(&theirs, &text(&answers.0)) == text(&answers.1)
                    };
                    let named = in_path(path, &theirs) + &foreign.query + &foreign.body;
                    let tells = |id: &str| !named.contains(id) && text(&answers.0).contains(id);
                    let secrets = [&theirs.executor, &theirs.registration, &theirs.session, &theirs.transfer];
                    if statuses != foreign.statuses
                        || (statuses.0 == statuses.1 && !alike())
                        || secrets.into_iter().any(|id| tells(id))
                    {
                        faults.push(format!("{what}: {answers:?}"));
                    }
                }
            }
        }
    }
    assert!(faults.is_empty(), "{}", faults.join("\n\n"));
    println!("{asked} pairs of requests");
    let shown = format!("/api/connectors/processes/{}", theirs.session);
    let state = bench.caller.send("GET", &shown, &[], "").await.json()["state"].clone();
    assert_eq!(state, "running", "nothing of theirs has noticed");
}

/// A workspace with a real executor, a running process, a transfer and a turn.
async fn theirs(bench: &Workbench) -> Ids {
    let executor = bench.credentials.executor.clone();
    let started = bench.caller.result("box", "exec_command", json!({ "command": "cat" })).await;
    let service = Caller::new(bench.gateway.address(), Some(SHARED_SECRET.to_owned()));
    let transfer = json!({ "workspace_id": "w", "source_exe_id": executor, "dest_exe_id": executor });
    let transfer = service.post("/api/exec-gateway/relay/create", transfer).await;
    let CreatedTransfer { ticket, .. } = serde_json::from_slice(&transfer.body).unwrap();
    Ids {
        workspace: "w".into(),
        environment: "box".into(),
        registration: registration(&bench.caller, &executor).await,
        link_ticket: link_ticket(&bench.gateway, &executor),
        executor,
        session: started["structuredContent"]["session_id"].as_str().unwrap().to_owned(),
        transfer: ticket,
        turn: "turn-1".into(),
    }
}

async fn with_executor(gateway: &TestGateway) -> (Caller, Credentials, impl Sized) {
    let credentials = gateway.executor("ours", "mine").await;
    let connected = FakeExecutor::connected(gateway, &credentials).await;
    (gateway.caller("ours").await, credentials, connected)
}

/// The registration of a connected executor, as harnesses learn of it.
async fn registration(caller: &Caller, executor: &str) -> String {
    let path = format!("/cloud/environment/{executor}/connect");
    let way = caller.post(&path, json!({ "harness_public_key": key() })).await.json();
    way["executor_registration_id"].as_str().unwrap().to_owned()
}

fn key() -> HarnessKey {
    KeyBytes { x25519: [1; 32], mlkem768: Box::new([2; 1184]) }.encode()
}

fn link_ticket(gateway: &TestGateway, executor: &str) -> String {
    let executor: ExecutorId = executor.parse().unwrap();
    gateway.gateway.api().corridor.auth.tickets().mint(&executor)
}

/// The path with these ids.
fn in_path(path: &str, ids: &Ids) -> String {
    path.replace("{name}", &ids.environment)
        .replace("{sid}", &ids.session)
        .replace("{id}", &ids.executor)
        .replace("{wid}", &ids.workspace)
        .replace("{registration}", &ids.registration)
        .replace("{ticket}", &ids.transfer)
}

async fn send(caller: &Caller, method: &str, path: &str, ask: &Ask, route: Route, ours: &Ours) -> Answer {
    let mut headers = ask.headers.clone();
    if route == Route::RegisterDirect {
        headers.extend(Signer::of(&ours.executor).sign(method, &caller.address.to_string(), path, &ask.body));
    }
    // Who shows another credential does not show the caller's.
    let shown = headers.iter().any(|(name, _)| *name == "authorization") || path.contains("token=");
    let caller = if shown { &Caller::new(caller.address, None) } else { caller };
    let headers: Vec<_> = headers.iter().map(|(name, value)| (*name, value.as_str())).collect();
    caller.send(method, path, &headers, ask.body.clone()).await
}
