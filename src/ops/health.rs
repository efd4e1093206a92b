//! The operators' listener: alive, ready, metrics, state. It answers under any load, since no caller reaches it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use hyper::body::Incoming;
use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::{Method, Request, Response, StatusCode};
use serde_json::Value;

use super::metrics::Printer;
use crate::edge::body::{Body, full};
use crate::store::Store;

/// Longest time the store may take to prove that it writes.
const STORE_WAIT: Duration = Duration::from_secs(2);

const TEXT: HeaderValue = HeaderValue::from_static("text/plain; charset=utf-8");

/// What operators can ask.
pub struct Health {
    /// Where readiness is proven by a write.
    pub store: Store,
    /// What `/metrics` prints.
    pub metrics: Printer,
    /// Sets the metrics that other parts know themselves.
    pub read: Box<dyn Fn() + Send + Sync>,
    /// Whether the gateway takes new work.
    pub serving: AtomicBool,
    /// What else keeps the gateway from its work, in a few words each.
    pub troubles: Box<dyn Fn() -> Vec<&'static str> + Send + Sync>,
    /// What `/debug/state` prints.
    pub state: Box<dyn Fn() -> Value + Send + Sync>,
}

impl Health {
    /// Answers one request of an operator.
    pub async fn answer(self: Arc<Self>, request: Request<Incoming>) -> Response<Body> {
        if !matches!(*request.method(), Method::GET | Method::HEAD) {
            return text(StatusCode::METHOD_NOT_ALLOWED, "use GET\n");
        }
        match request.uri().path() {
            "/healthz" => text(StatusCode::OK, "ok\n"),
            "/readyz" => self.ready().await,
            "/metrics" => self.metrics(),
            "/debug/state" => self.state(),
            _ => text(StatusCode::NOT_FOUND, "/healthz /readyz /metrics /debug/state\n"),
        }
    }

    /// All that keeps the gateway from its work, a line each.
    async fn ready(&self) -> Response<Body> {
        let mut troubles = Vec::new();
        if !self.serving.load(Ordering::Relaxed) {
            troubles.push("draining");
        }
        match tokio::time::timeout(STORE_WAIT, self.store.health()).await {
            Ok(Ok(())) => {}
            Ok(Err(_)) | Err(_) => troubles.push("store does not write"),
        }
        troubles.extend((self.troubles)());
        if troubles.is_empty() {
            return text(StatusCode::OK, "ready\n");
        }
        text(StatusCode::SERVICE_UNAVAILABLE, troubles.join("\n") + "\n")
    }

    fn metrics(&self) -> Response<Body> {
        (self.read)();
        let open_metrics = HeaderValue::from_static("application/openmetrics-text; version=1.0.0; charset=utf-8");
        answer(StatusCode::OK, open_metrics, self.metrics.to_string())
    }

    fn state(&self) -> Response<Body> {
        let page = format!("{:#}\n", (self.state)());
        answer(StatusCode::OK, HeaderValue::from_static("application/json"), page)
    }
}

fn text(status: StatusCode, text: impl Into<String>) -> Response<Body> {
    answer(status, TEXT, text.into())
}

fn answer(status: StatusCode, kind: HeaderValue, page: String) -> Response<Body> {
    let mut response = Response::new(full(page));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, kind);
    response
}
