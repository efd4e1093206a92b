//! The operators' listener: alive, ready, metrics. It answers under any load, since no caller reaches it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use hyper::body::Incoming;
use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::{Method, Request, Response, StatusCode};
use prometheus_client::encoding::text::encode;
use prometheus_client::registry::Registry;

use crate::edge::body::{Body, full};
use crate::store::Store;

/// Longest time the store may take to prove that it writes.
const STORE_WAIT: Duration = Duration::from_secs(2);

/// What operators can ask.
pub struct Health {
    /// Where readiness is proven by a write.
    pub store: Store,
    /// What `/metrics` prints.
    pub registry: Registry,
    /// Whether the gateway takes new work.
    pub serving: AtomicBool,
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
            _ => text(StatusCode::NOT_FOUND, "/healthz /readyz /metrics\n"),
        }
    }

    async fn ready(&self) -> Response<Body> {
        if !self.serving.load(Ordering::Relaxed) {
            return text(StatusCode::SERVICE_UNAVAILABLE, "draining\n");
        }
        match tokio::time::timeout(STORE_WAIT, self.store.health()).await {
            Ok(Ok(())) => text(StatusCode::OK, "ready\n"),
            Ok(Err(_)) | Err(_) => text(StatusCode::SERVICE_UNAVAILABLE, "store does not write\n"),
        }
    }

    fn metrics(&self) -> Response<Body> {
        let mut page = String::new();
        if encode(&mut page, &self.registry).is_err() {
            return text(StatusCode::INTERNAL_SERVER_ERROR, "metrics cannot be written\n");
        }
        let mut response = Response::new(full(page));
        let open_metrics = HeaderValue::from_static("application/openmetrics-text; version=1.0.0; charset=utf-8");
        response.headers_mut().insert(CONTENT_TYPE, open_metrics);
        response
    }
}

fn text(status: StatusCode, text: &'static str) -> Response<Body> {
    let mut response = Response::new(full(text));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    response
}
