//! Spans of requests, sent to an OpenTelemetry collector in batches (OTLP over HTTP) by a thread of their own. No request
//! waits for that: what the collector does not take in time is dropped.

#[cfg(feature = "otlp")]
pub use sending::{Spans, start};
#[cfg(not(feature = "otlp"))]
pub use without::{Spans, start};

/// A build without the feature; the configuration refuses a collector there.
#[cfg(not(feature = "otlp"))]
mod without {
    use tracing_subscriber::layer::Identity;

    /// No spans.
    pub struct Spans;

    impl Spans {
        /// What keeps nothing.
        pub fn layer(&self) -> Identity {
            Identity::new()
        }
    }

    /// Starts nothing.
    pub fn start(_collector: Option<&str>) -> anyhow::Result<Spans> {
        Ok(Spans)
    }
}

#[cfg(feature = "otlp")]
mod sending {
    use std::pin::Pin;
    use std::time::Duration;

    use anyhow::Context;
    use bytes::Bytes;
    use http_body_util::{BodyExt, Full, Limited};
    use hyper::{Request, Response};
    use hyper_util::client::legacy::Client;
    use hyper_util::client::legacy::connect::HttpConnector;
    use hyper_util::rt::TokioExecutor;
    use opentelemetry::trace::TracerProvider;
    use opentelemetry_http::{HttpClient, HttpError};
    use opentelemetry_otlp::{SpanExporter, WithExportConfig, WithHttpConfig};
    use opentelemetry_sdk::Resource;
    use opentelemetry_sdk::trace::SdkTracerProvider;
    use tokio::runtime::Runtime;
    use tracing::Subscriber;
    use tracing_subscriber::filter::filter_fn;
    use tracing_subscriber::layer::Layer;
    use tracing_subscriber::registry::LookupSpan;

    /// For one batch, and for the last one.
    const SEND_MAX: Duration = Duration::from_secs(5);

    /// Answers of collectors are a few bytes.
    const ANSWER_BYTES_MAX: usize = 64 * 1024;

    /// Spans that are sent while this lives; the last ones as it goes.
    pub struct Spans(Option<SdkTracerProvider>);

    impl Spans {
        /// What makes them of the program's own spans.
        pub fn layer<S: Subscriber + for<'a> LookupSpan<'a>>(&self) -> impl Layer<S> + use<S> {
            self.0.as_ref().map(|provider| {
                let layer = tracing_opentelemetry::layer().with_tracer(provider.tracer("exec-gateway"));
                layer.with_filter(filter_fn(|about| about.is_span() && about.target().starts_with("exec_gateway")))
            })
        }
    }

    impl Drop for Spans {
        fn drop(&mut self) {
            if let Some(provider) = &self.0 {
                let _ = provider.shutdown_with_timeout(SEND_MAX);
            }
        }
    }

    /// Starts sending, where there is a collector.
    ///
    /// # Errors
    /// Its address is of no use, or there is no thread to be had.
    pub fn start(collector: Option<&str>) -> anyhow::Result<Spans> {
        let Some(collector) = collector else { return Ok(Spans(None)) };
        let exporter = SpanExporter::builder()
            .with_http()
            .with_http_client(Sender::new()?)
            .with_endpoint(format!("{}/v1/traces", collector.trim_end_matches('/')))
            .build()
            .context("spans cannot be sent to otlp_endpoint")?;
        let resource = Resource::builder().with_service_name("exec-gateway").build();
        let provider = SdkTracerProvider::builder().with_batch_exporter(exporter).with_resource(resource).build();
        Ok(Spans(Some(provider)))
    }

    /// Sends batches from the thread that makes them, which is none of the gateway's.
    #[derive(Debug)]
    struct Sender {
        runtime: Runtime,
        client: Client<HttpConnector, Full<Bytes>>,
    }

    impl Sender {
        fn new() -> anyhow::Result<Self> {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("no runtime")?;
            // A kept connection would have nobody to see it close between two batches.
            let client = Client::builder(TokioExecutor::new()).pool_max_idle_per_host(0).build_http();
            Ok(Self { runtime, client })
        }

        async fn send(&self, request: Request<Bytes>) -> Result<Response<Bytes>, HttpError> {
            let exchange = async {
                let (head, body) = self.client.request(request.map(Full::new)).await?.into_parts();
                let body = Limited::new(body, ANSWER_BYTES_MAX).collect().await?.to_bytes();
                Ok(Response::from_parts(head, body))
            };
            tokio::time::timeout(SEND_MAX, exchange).await?
        }
    }

    impl HttpClient for Sender {
        fn send_bytes<'a, 'b>(
            &'a self,
            request: Request<Bytes>,
        ) -> Pin<Box<dyn Future<Output = Result<Response<Bytes>, HttpError>> + Send + 'b>>
        where
            'a: 'b,
            Self: 'b,
        {
            Box::pin(async move {
                let sent = self.runtime.block_on(self.send(request));
                sent.inspect_err(|error| tracing::warn!(%error, "spans were not sent"))
            })
        }
    }
}
