//! Stand-ins for the tests of this module: a validator over real HTTP on loopback, and a clock that is set by hand.
//!
//! Each test has its own; nothing here is compiled into the gateway.
#![allow(clippy::unwrap_used)]

use std::convert::Infallible;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::net::TcpListener;
use tokio::sync::watch;

use super::cache::lock;
use super::keys::Keys;
use super::upstream::Upstream;
use super::{Clock, TokenCounters};
use crate::config::{self, Secret};
use crate::store::{GatewayKey, Keyring};

/// What the validator does with a question.
#[derive(Clone)]
pub(super) enum Reply {
    Answer(u16, String),
    Redirect(String),
    Never,
}

pub(super) fn ok(body: &str) -> Reply {
    Reply::Answer(200, body.into())
}

pub(super) fn refused() -> Reply {
    Reply::Answer(401, String::new())
}

pub(super) struct FakeValidator {
    pub(super) url: String,
    shared: Arc<Shared>,
}

type Decide = dyn Fn(u64, &Value) -> Reply + Send + Sync;

struct Shared {
    decide: Mutex<Arc<Decide>>,
    asked: watch::Sender<u64>,
    open: watch::Sender<bool>,
    last: Mutex<Option<(String, Option<String>, Value)>>,
}

impl FakeValidator {
    pub(super) async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let shared = Arc::new(Shared {
            decide: Mutex::new(Arc::new(|_, _| refused())),
            asked: watch::Sender::new(0),
            open: watch::Sender::new(true),
            last: Mutex::new(None),
        });
        let state = shared.clone();
        tokio::spawn(async move {
            while let Ok((socket, _)) = listener.accept().await {
                let state = state.clone();
                tokio::spawn(async move {
                    let service = service_fn(move |request| answer(state.clone(), request));
                    let _ = hyper::server::conn::http1::Builder::new()
                        .serve_connection(TokioIo::new(socket), service)
                        .await;
                });
            }
        });
        Self { url, shared }
    }

    /// Answers every question alike from now on.
    pub(super) fn replies(&self, reply: Reply) {
        self.decides(move |_, _| reply.clone());
    }

    /// Decides by the number of the question, from 1, and its body.
    pub(super) fn decides(&self, decide: impl Fn(u64, &Value) -> Reply + Send + Sync + 'static) {
        *lock(&self.shared.decide) = Arc::new(decide);
    }

    /// Holds all answers back until [`Self::release`].
    pub(super) fn hold(&self) {
        self.shared.open.send_replace(false);
    }

    pub(super) fn release(&self) {
        self.shared.open.send_replace(true);
    }

    pub(super) fn asked(&self) -> u64 {
        *self.shared.asked.borrow()
    }

    pub(super) async fn asked_at_least(&self, count: u64) {
        self.shared.asked.subscribe().wait_for(|asked| *asked >= count).await.unwrap();
    }

    /// Path, secret and body of the last question.
    pub(super) fn last_question(&self) -> (String, Option<String>, Value) {
        lock(&self.shared.last).clone().unwrap()
    }

    pub(super) fn config(&self) -> config::Auth {
        config::Auth {
            upstream_url: Some(self.url.clone()),
            upstream_secret: Some(Secret::new("between-us".into())),
            ..config::Auth::default()
        }
    }

    pub(super) fn client(&self, counters: &Arc<TokenCounters>) -> Upstream {
        Upstream::new(&self.url, &self.config(), counters.clone(), Arc::default()).unwrap()
    }
}

async fn answer(state: Arc<Shared>, request: Request<Incoming>) -> Result<Response<Full<Bytes>>, Infallible> {
    let path = request.uri().path().to_owned();
    let secret = request.headers().get("x-internal-secret").map(|value| value.to_str().unwrap().to_owned());
    let body = request.into_body().collect().await.unwrap().to_bytes();
    let question: Value = serde_json::from_slice(&body).unwrap();
    *lock(&state.last) = Some((path, secret, question.clone()));
    let mut number = 0;
    state.asked.send_modify(|asked| {
        *asked += 1;
        number = *asked;
    });
    state.open.subscribe().wait_for(|open| *open).await.unwrap();
    let decide = lock(&state.decide).clone();
    let mut response = Response::new(Full::default());
    match decide(number, &question) {
        Reply::Answer(status, body) => {
            *response.status_mut() = status.try_into().unwrap();
            *response.body_mut() = body.into();
        }
        Reply::Redirect(to) => {
            *response.status_mut() = hyper::StatusCode::TEMPORARY_REDIRECT;
            response.headers_mut().insert(hyper::header::LOCATION, to.parse().unwrap());
        }
        Reply::Never => std::future::pending().await,
    }
    Ok(response)
}

/// A wall clock that stands still until it is moved.
#[derive(Clone)]
pub(super) struct FakeClock(Arc<AtomicU64>);

impl FakeClock {
    pub(super) fn at(unix_secs: u64) -> Self {
        Self(Arc::new(AtomicU64::new(unix_secs)))
    }

    pub(super) fn advance(&self, secs: u64) {
        self.0.fetch_add(secs, SeqCst);
    }

    pub(super) fn now(&self) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(self.0.load(SeqCst))
    }

    pub(super) fn clock(&self) -> Clock {
        let clock = self.clone();
        Clock(Arc::new(move || clock.now()))
    }
}

/// A keyring of keys told apart by one byte; the kid of key 1 is `kid1`.
pub(super) fn ring(current: u8, previous: Option<u8>) -> Keys {
    let key = |byte: u8| GatewayKey { kid: format!("kid{byte}"), secret: vec![byte; 32].into() };
    Keys::new(Keyring { current: key(current), previous: previous.map(key) })
}
