//! Distributed traces: what a caller says of its trace is told on, and nothing else is.

use serde_json::json;

use crate::support::caller::Caller;
use crate::support::fake_executor::FakeExecutor;
use crate::support::gateway::TestGateway;
use crate::support::upstream::Upstream;

const PARENT: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

async fn call(caller: &Caller, headers: &[(&str, &str)]) {
    let call = json!({ "tool": "shell", "arguments": { "command": ["true"] } });
    let answer = caller.send("POST", "/api/connectors/envs/box/tool/call", headers, call.to_string()).await;
    assert_eq!(answer.status, 200, "{answer:?}");
}

#[tokio::test]
async fn a_callers_trace_goes_on_to_the_executor_and_to_the_validator() {
    let upstream = Upstream::start().await;
    let gateway = TestGateway::with(|config| upstream.configure(config)).await;
    upstream.knows_token("good", "w");
    let credentials = gateway.executor("w", "box").await;
    upstream.knows_executor(&credentials.token, "u");
    let (executor, _link) = FakeExecutor::connected(&gateway, &credentials).await;
    let caller = Caller::new(gateway.address(), Some("good".into()));
    let call = async |headers: &[(&str, &str)]| call(&caller, headers).await;

    call(&[("traceparent", PARENT), ("tracestate", "a=1"), ("tracestate", "b=2")]).await;
    let told = executor.traces();
    let expected = json!({ "traceparent": PARENT, "tracestate": "a=1,b=2" });
    assert!(!told.is_empty() && told.iter().all(|trace| *trace == expected), "{told:?}");
    assert_eq!(upstream.traces(), [PARENT]);

    call(&[]).await;
    call(&[("traceparent", "00-what-ever-01")]).await;
    assert_eq!(executor.traces(), told, "who says nothing of a trace is of none");
}

/// In a build that makes them: `make test-otlp`.
#[cfg(feature = "otlp")]
mod spans {
    use http_body_util::BodyExt;
    use hyper::body::Incoming;
    use hyper::service::service_fn;
    use hyper::{Request, Response};
    use hyper_util::rt::TokioIo;
    use tokio::net::TcpListener;
    use tokio::sync::mpsc;

    use super::*;
    use crate::support::gateway::{DaemonProcess, workspace};
    use crate::support::{Scratch, eventually};

    /// A collector, and what it is sent to `/v1/traces`.
    async fn collector() -> (String, mpsc::UnboundedReceiver<Vec<u8>>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let (sent, batches) = mpsc::unbounded_channel();
        tokio::spawn(async move {
            while let Ok((socket, _)) = listener.accept().await {
                let sent = sent.clone();
                let service = service_fn(move |request: Request<Incoming>| {
                    let sent = sent.clone();
                    async move {
                        assert_eq!(request.uri().path(), "/v1/traces");
                        let batch = request.into_body().collect().await?.to_bytes();
                        let _ = sent.send(batch.to_vec());
                        Ok::<_, hyper::Error>(Response::new(String::new()))
                    }
                });
                let _ =
                    hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(socket), service).await;
            }
        });
        (address, batches)
    }

    fn holds(batch: &[u8], part: &[u8]) -> bool {
        batch.windows(part.len()).any(|window| window == part)
    }

    fn bytes(hex: &str) -> Vec<u8> {
        (0..hex.len()).step_by(2).map(|at| u8::from_str_radix(&hex[at..at + 2], 16).unwrap()).collect()
    }

    #[tokio::test]
    async fn the_spans_of_a_call_hang_below_the_callers_and_the_executors_below_them() {
        let (address, mut batches) = collector().await;
        let state = Scratch::new();
        let listen = "127.0.0.1:0".parse().unwrap();
        let daemon = DaemonProcess::start(&state, listen, &["--otlp-endpoint", &address]).await;
        let (caller, credentials) = workspace(&state, &daemon).await;
        let executor = FakeExecutor::new(daemon.address, &credentials);
        let _link = executor.register_and_dial().await;
        eventually("it is connected", async || (caller.environments().await == ["box"]).then_some(())).await;

        call(&caller, &[("traceparent", PARENT)]).await;

        let told = executor.traces();
        let below =
            told.iter().map(|trace| trace["traceparent"].as_str().unwrap()).find(|told| told[..35] == PARENT[..35]);
        let below = below.expect("a request of the call").to_owned();
        assert_ne!(below, PARENT, "it hangs below the gateway's own span");
        // The last spans are sent while it ends.
        assert_eq!(daemon.terminate().await, Some(0));
        let mut all = Vec::new();
        while let Ok(batch) = batches.try_recv() {
            all.extend(batch);
        }
        for part in [&bytes(&PARENT[3..35]), &bytes(&PARENT[36..52]), &bytes(&below[36..52])] {
            assert!(holds(&all, part), "{part:x?}");
        }
        for name in ["tool_call", "auth", "queue", "executor", "exec-gateway"] {
            assert!(holds(&all, name.as_bytes()), "{name}");
        }
        assert!(!holds(&all, b"egx_") && !holds(&all, b"egw_"), "no secrets");
    }
}
