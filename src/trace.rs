//! Trace: where a request stands in its caller's distributed trace, for whatever the gateway asks on its behalf.
//! Known to the doors, which read it, and to the clients of executors and of the validator, which tell it on.

use exec_gateway_protocol::trace::TraceContext;
use hyper::HeaderMap;
use hyper::header::HeaderValue;
use tracing::{Instrument, Span};

const TRACEPARENT: &str = "traceparent";
const TRACESTATE: &str = "tracestate";

tokio::task_local! {
    static CURRENT: TraceContext;
}

/// What a caller says of its trace. `None` where it says nothing, or nothing that can be read.
pub fn of(headers: &HeaderMap) -> Option<TraceContext> {
    let mut parents = headers.get_all(TRACEPARENT).iter();
    let (Some(parent), None) = (parents.next(), parents.next()) else { return None };
    let states: Vec<&str> = headers.get_all(TRACESTATE).iter().filter_map(|state| state.to_str().ok()).collect();
    TraceContext::parse(parent.to_str().ok()?, Some(&states.join(",")))
}

/// Tells it on in the headers of a request, if the work that is being done belongs to a trace.
pub fn tell(headers: &mut HeaderMap) {
    let Some(trace) = current() else { return };
    let mut insert = |name: &'static str, value: &str| {
        // What was read from a header can stand in one.
        if let Ok(value) = HeaderValue::from_str(value) {
            headers.insert(name, value);
        }
    };
    insert(TRACEPARENT, trace.traceparent());
    if let Some(state) = trace.tracestate() {
        insert(TRACESTATE, state);
    }
}

/// Does work that belongs to a trace, if to any, as a span of its own.
pub async fn within<T>(trace: Option<TraceContext>, span: Span, work: impl Future<Output = T>) -> T {
    #[cfg(feature = "otlp")]
    otlp::hang(&span, trace.as_ref());
    let work = work.instrument(span);
    match trace {
        Some(trace) => CURRENT.scope(trace, work).await,
        None => work.await,
    }
}

/// The trace of the work that is being done, for whatever that asks of others: at the gateway's own span where spans
/// are made, else at the caller's. Tasks that the work spawns are not of it.
pub fn current() -> Option<TraceContext> {
    #[cfg(feature = "otlp")]
    if let Some(own) = otlp::current() {
        return Some(own);
    }
    CURRENT.try_with(Clone::clone).ok()
}

/// Spans as OpenTelemetry knows them.
#[cfg(feature = "otlp")]
mod otlp {
    use exec_gateway_protocol::trace::TraceContext;
    use opentelemetry::Context;
    use opentelemetry::trace::{SpanContext, SpanId, TraceContextExt, TraceFlags, TraceId};
    use tracing::Span;
    use tracing_opentelemetry::OpenTelemetrySpanExt;

    /// Hangs a span below the caller's.
    pub(super) fn hang(span: &Span, trace: Option<&TraceContext>) {
        let Some(trace) = trace else { return };
        let (Ok(id), Ok(parent)) = (TraceId::from_hex(trace.trace_id()), SpanId::from_hex(trace.parent_id())) else {
            return;
        };
        let flags = TraceFlags::new(u8::from_str_radix(trace.flags(), 16).unwrap_or_default());
        let state = trace.tracestate().and_then(|state| state.parse().ok()).unwrap_or_default();
        let parent = Context::new().with_remote_span_context(SpanContext::new(id, parent, flags, true, state));
        // Fails where nobody makes spans.
        let _ = span.set_parent(parent);
    }

    /// The place of the span that is entered.
    pub(super) fn current() -> Option<TraceContext> {
        let context = Span::current().context();
        let span = context.span();
        let place = span.span_context();
        let flags = place.trace_flags().to_u8();
        let parent = format!("00-{}-{}-{flags:02x}", place.trace_id(), place.span_id());
        TraceContext::parse(&parent, Some(&place.trace_state().header()))
    }
}
