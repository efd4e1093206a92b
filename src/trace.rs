//! Trace: where a request stands in its caller's distributed trace, for whatever the gateway asks on its behalf.
//! Known to the doors, which read it, and to the clients of executors and of the validator, which tell it on.

use exec_gateway_protocol::trace::TraceContext;
use hyper::HeaderMap;
use hyper::header::HeaderValue;

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

/// Does work that belongs to a trace, if to any.
pub async fn within<T>(trace: Option<TraceContext>, work: impl Future<Output = T>) -> T {
    match trace {
        Some(trace) => CURRENT.scope(trace, work).await,
        None => work.await,
    }
}

/// The trace of the work that is being done; tasks that it spawns are not of it.
pub fn current() -> Option<TraceContext> {
    CURRENT.try_with(Clone::clone).ok()
}
