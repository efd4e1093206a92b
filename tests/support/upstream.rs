//! The service that validates proxy tokens and executor credentials, over real HTTP, with answers that a test chooses.
//! It can hang, fail, go away and come back on the same port.

use std::collections::HashMap;
use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use exec_gateway::config::{Config, Secret};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::net::TcpSocket;
use tokio::sync::watch;
use tokio::task::JoinSet;

const SECRET: &str = "between-the-two";

/// What it says to one credential.
#[derive(Debug, Clone)]
pub enum Verdict {
    /// This status with this body.
    Say(u16, Value),
    /// Nothing, for ever.
    Silence,
}

/// A validator of this test alone.
pub struct Upstream {
    pub address: SocketAddr,
    shared: Arc<Shared>,
    server: JoinSet<()>,
    /// Never listens: keeps the port from all other tests while the service is away.
    _place: TcpSocket,
}

struct Shared {
    verdicts: Mutex<HashMap<String, Verdict>>,
    to_all: Mutex<Option<Verdict>>,
    asked: Mutex<HashMap<String, usize>>,
    traces: Mutex<Vec<String>>,
    open: watch::Sender<bool>,
    /// The newest last.
    secrets: Mutex<Vec<String>>,
}

impl Upstream {
    pub async fn start() -> Self {
        let place = bind("127.0.0.1:0".parse().unwrap());
        let address = place.local_addr().unwrap();
        let shared = Arc::new(Shared {
            verdicts: Mutex::default(),
            to_all: Mutex::default(),
            asked: Mutex::default(),
            traces: Mutex::default(),
            open: watch::Sender::new(true),
            secrets: Mutex::new(vec![SECRET.to_owned()]),
        });
        let mut upstream = Self { address, shared, server: JoinSet::new(), _place: place };
        upstream.come_back();
        upstream
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Makes a gateway ask it.
    pub fn configure(&self, config: &mut Config) {
        config.auth.upstream_url = Some(format!("http://{}", self.address));
        config.auth.upstream_secret = Some(Secret::new(SECRET.into()));
        config.auth.upstream_timeout_secs = 1;
    }

    /// Takes this secret from now on, and the one before it.
    pub fn expects(&self, secret: &str) {
        let mut secrets = self.shared.secrets.lock().unwrap();
        secrets.push(secret.to_owned());
        let old = secrets.len().saturating_sub(2);
        secrets.drain(..old);
    }

    /// A proxy token that is good for this workspace.
    pub fn knows_token(&self, token: &str, workspace: &str) {
        self.says(token, Verdict::Say(200, json!({ "workspace_id": workspace })));
    }

    /// An executor's credential that belongs to this person.
    pub fn knows_executor(&self, credential: &str, user: &str) {
        self.says(credential, Verdict::Say(200, json!({ "user_id": user })));
    }

    /// What it says to this credential from now on; one without a verdict is refused.
    pub fn says(&self, credential: &str, verdict: Verdict) {
        self.shared.verdicts.lock().unwrap().insert(credential.to_owned(), verdict);
    }

    /// What it says to every credential, whatever it knows; `None` ends that.
    pub fn says_to_all(&self, verdict: Option<Verdict>) {
        *self.shared.to_all.lock().unwrap() = verdict;
    }

    /// How often it was asked about this credential.
    pub fn asked(&self, credential: &str) -> usize {
        self.shared.asked.lock().unwrap().get(credential).copied().unwrap_or(0)
    }

    /// How often it was asked at all.
    pub fn asked_in_all(&self) -> usize {
        self.shared.asked.lock().unwrap().values().sum()
    }

    /// Holds all answers back until [`Self::release`].
    /// The traces that questions said they belong to.
    pub fn traces(&self) -> Vec<String> {
        self.shared.traces.lock().unwrap().clone()
    }

    pub fn hold(&self) {
        self.shared.open.send_replace(false);
    }

    pub fn release(&self) {
        self.shared.open.send_replace(true);
    }

    /// Closes the port and all connections.
    pub async fn go_away(&mut self) {
        self.server.shutdown().await;
    }

    /// Listens on the same port again.
    pub fn come_back(&mut self) {
        let listener = bind(self.address).listen(1024).unwrap();
        let shared = self.shared.clone();
        self.server.spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((socket, _)) = listener.accept().await {
                let shared = shared.clone();
                connections.spawn(async move {
                    let service = service_fn(move |request| answer(shared.clone(), request));
                    let connection = hyper::server::conn::http1::Builder::new();
                    let _ = connection.serve_connection(TokioIo::new(socket), service).await;
                });
            }
        });
    }
}

fn bind(address: SocketAddr) -> TcpSocket {
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_reuseport(true).unwrap();
    socket.bind(address).unwrap();
    socket
}

async fn answer(shared: Arc<Shared>, request: Request<Incoming>) -> Result<Response<Full<Bytes>>, Infallible> {
    let (head, body) = request.into_parts();
    let question: Value = serde_json::from_slice(&body.collect().await.unwrap().to_bytes()).unwrap();
    let credential = match head.uri.path() {
        "/internal/validate-proxy-token" => &question["proxy_token"],
        "/internal/codex-auth/validate" if question["scheme"] == "bearer" => &question["token"],
        "/internal/codex-auth/validate" => &question["assertion"],
        other => panic!("the gateway asked {other}"),
    };
    let shown = head.headers["x-internal-secret"].to_str().unwrap();
    assert!(shared.secrets.lock().unwrap().iter().any(|secret| secret == shown), "the gateway showed {shown}");
    let credential = credential.as_str().unwrap().to_owned();
    let trace = head.headers.get("traceparent").map(|trace| trace.to_str().unwrap().to_owned());
    shared.traces.lock().unwrap().extend(trace);
    *shared.asked.lock().unwrap().entry(credential.clone()).or_default() += 1;
    let _ = shared.open.subscribe().wait_for(|open| *open).await;
    let to_all = shared.to_all.lock().unwrap().clone();
    let verdict = to_all.or_else(|| shared.verdicts.lock().unwrap().get(&credential).cloned());
    let (status, body) = match verdict.unwrap_or(Verdict::Say(401, json!({ "error": "unknown" }))) {
        Verdict::Say(status, body) => (status, body),
        Verdict::Silence => std::future::pending().await,
    };
    let mut response = Response::new(Full::new(body.to_string().into()));
    *response.status_mut() = status.try_into().unwrap();
    Ok(response)
}
