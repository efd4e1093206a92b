//! Server: one message as `rmcp` hands it on, answered from the tools that its sender may call. Lives as long as that.

use std::collections::HashMap;
use std::sync::{Arc, LazyLock, Mutex, PoisonError};
use std::time::Duration;

use futures_util::FutureExt;
use rmcp::model::{
    CallToolRequestParams, CallToolResponse, CallToolResult, ContentBlock, CustomRequest, CustomResult, ErrorCode,
    Implementation, InitializeResult, JsonObject, ListToolsResult, PaginatedRequestParams, ProgressNotificationParam,
    ProgressToken, ServerCapabilities, Tool as Listed, ToolAnnotations,
};
use rmcp::service::{Peer, RequestContext};
use rmcp::{ErrorData, RoleServer, ServerHandler};
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio::time::{Instant, interval_at};

use super::cut::cut;
use crate::api::Api;
use crate::api::calls::{Admitted, Order, failure};
use crate::api::error::ApiError;
use crate::protocol::rest::{Content, Ran, ToolResult};
use crate::tools::{Effect, Progress, Tool};

/// What models are told about all tools together.
const INSTRUCTIONS: &str = "Run commands and work with files on remote machines, called environments. \
    environment_id names one; leave it out where there is only one or a default. list_environments shows them.";

/// When a caller that asks for it is first told that its call goes on.
const FIRST_PROGRESS: Duration = Duration::from_secs(1);

/// The argument that says where a tool works.
const ENVIRONMENT: &str = "environment_id";

/// One message and its sender.
#[derive(Clone)]
pub(super) struct Server(Arc<Message>);

struct Message {
    api: Arc<Api>,
    /// Until the call takes it.
    admitted: Mutex<Option<Admitted>>,
    client: String,
}

impl Server {
    pub(super) fn new(api: Arc<Api>, admitted: Admitted, client: String) -> Self {
        Self(Arc::new(Message { api, admitted: Mutex::new(Some(admitted)), client }))
    }

    fn admitted<T>(&self, ask: impl FnOnce(&mut Option<Admitted>) -> T) -> T {
        ask(&mut self.0.admitted.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Runs a tool. A call that its client cancels, or whose client has left, is dropped, and with it what it started.
    async fn run(
        &self,
        request: CallToolRequestParams,
        context: RequestContext<RoleServer>,
    ) -> Result<ToolResult, ErrorData> {
        let api = &self.0.api;
        let Some(admitted) = self.admitted(Option::take) else {
            return Err(ErrorData::internal_error("the message was handed on twice", None));
        };
        let tool = match admitted.tool(&request.name) {
            Ok(tool) => tool,
            Err(unknown) if unknown.code() == "unknown_tool" => {
                return Err(ErrorData::invalid_params(unknown.message().to_owned(), None));
            }
            Err(refused) => return Ok(failure(&refused)),
        };
        let mut arguments = request.arguments.unwrap_or_default();
        let environment = match arguments.get(ENVIRONMENT) {
            _ if !tool.needs_environment() => None,
            None | Some(Value::Null) => None,
            Some(Value::String(name)) => Some(name.clone()),
            Some(_) => return Ok(failure(&ApiError::new(400, "bad_arguments", "environment_id: expected a string"))),
        };
        if tool.needs_environment() {
            arguments.remove(ENVIRONMENT);
        }
        let listed = api.mcp_calls.list(super::call_of(&self.0.client, &context.id));
        let token = context.meta.get_progress_token();
        let (progress, far) = watch::channel(Progress::default());
        let order = Order {
            tool,
            environment,
            key: None,
            arguments: Value::Object(arguments),
            text_bytes_max: Some(api.config.now().mcp.text_bytes_max),
            progress: token.is_some().then_some(progress),
        };
        let every = Duration::from_secs(api.config.now().mcp.progress_secs);
        let run = std::panic::AssertUnwindSafe(admitted.run(api.clone(), order)).catch_unwind();
        tokio::select! {
            biased;
            () = listed.cancelled.cancelled() => {
                let cancelled = ApiError::new(499, "cancelled", "the call was cancelled by its client");
                Ok(failure(&cancelled.with_ran(Ran::Unknown)))
            }
            () = context.ct.cancelled() => Err(ErrorData::internal_error("the client has left", None)),
            result = run => Ok(match result {
                Ok(result) => cut(result.unwrap_or_else(|error| failure(&error)), api.config.now().mcp.text_bytes_max),
                Err(_) => {
                    api.metrics.panics.inc();
                    failure(&ApiError::internal("the gateway failed at this request"))
                }
            }),
            never = tell(context.peer.clone(), token, far, every) => match never {},
        }
    }
}

/// Tells the client now and then that its call goes on, and how far it is; in bytes where the tool counts them, else in
/// seconds. Never returns.
async fn tell(
    peer: Peer<RoleServer>,
    token: Option<ProgressToken>,
    far: watch::Receiver<Progress>,
    every: Duration,
) -> std::convert::Infallible {
    let Some(token) = token else { return std::future::pending().await };
    let began = Instant::now();
    let mut ticks = interval_at(began + FIRST_PROGRESS.min(every), every);
    let mut told = 0.0;
    loop {
        ticks.tick().await;
        let Progress { done, total } = *far.borrow();
        let counted = done > 0;
        #[expect(clippy::cast_precision_loss, reason = "the protocol has floating-point numbers")]
        let progress = if counted { done as f64 } else { began.elapsed().as_secs_f64().floor() };
        // It has to grow from one time to the next.
        if progress <= told {
            continue;
        }
        told = progress;
        let mut notification = ProgressNotificationParam::new(token.clone(), progress);
        #[expect(clippy::cast_precision_loss, reason = "the protocol has floating-point numbers")]
        if counted && let Some(total) = total {
            notification = notification.with_total(total as f64);
        }
        let message = if counted { format!("{done} bytes") } else { format!("running for {progress} s") };
        let _ = peer.notify_progress(notification.with_message(message)).await;
    }
}

impl ServerHandler for Server {
    fn get_info(&self) -> InitializeResult {
        InitializeResult::new(ServerCapabilities::builder().enable_tools().build())
            .with_server_info(Implementation::new("exec-gateway", env!("CARGO_PKG_VERSION")))
            .with_instructions(INSTRUCTIONS)
    }

    /// Only what the caller may call.
    async fn list_tools(
        &self,
        _request: Option<PaginatedRequestParams>,
        _context: RequestContext<RoleServer>,
    ) -> Result<ListToolsResult, ErrorData> {
        let tools = self.admitted(|admitted| {
            admitted.iter().flat_map(Admitted::tools).map(|tool| LISTED[tool.name()].clone()).collect()
        });
        Ok(ListToolsResult::with_all_items(tools))
    }

    fn get_tool(&self, name: &str) -> Option<Listed> {
        LISTED.get(name).cloned()
    }

    /// What `rmcp` cannot read as a request that it knows.
    async fn on_custom_request(
        &self,
        request: CustomRequest,
        _context: RequestContext<RoleServer>,
    ) -> Result<CustomResult, ErrorData> {
        if request.method == "tools/call" {
            return Err(ErrorData::invalid_params("tools/call: expected a name and an object of arguments", None));
        }
        Err(ErrorData::new(ErrorCode::METHOD_NOT_FOUND, format!("no such method: {}", request.method), None))
    }

    async fn call_tool(
        &self,
        request: CallToolRequestParams,
        context: RequestContext<RoleServer>,
    ) -> Result<CallToolResponse, ErrorData> {
        let ToolResult { content, structured_content, is_error } = self.run(request, context).await?;
        let content = content.into_iter().map(|Content::Text { text }| ContentBlock::text(text)).collect();
        let mut result = CallToolResult::success(content);
        result.structured_content = structured_content;
        result.is_error = Some(is_error);
        Ok(result.into())
    }
}

/// Every tool as clients are told of it.
static LISTED: LazyLock<HashMap<&'static str, Listed>> =
    LazyLock::new(|| Tool::ALL.iter().map(|tool| (tool.name(), listed(tool))).collect());

fn listed(tool: &Tool) -> Listed {
    let mut input = object(tool.input_schema());
    if tool.needs_environment() {
        let environment = json!({
            "type": "string",
            "description": "Where to do it: a name from list_environments. Not needed where there is only one \
                            environment or a default.",
        });
        let properties = input.entry("properties").or_insert_with(|| json!({}));
        properties[ENVIRONMENT] = environment;
    }
    let effect = tool.effect();
    let annotations = ToolAnnotations::new()
        .read_only(effect == Effect::Reads)
        .destructive(effect == Effect::Destroys)
        // Commands reach wherever their machine does.
        .open_world(effect == Effect::Destroys);
    Listed::new(tool.name(), tool.description(), Arc::new(input))
        .with_raw_output_schema(Arc::new(or_failure(object(tool.output_schema()))))
        .with_annotations(annotations)
}

/// The schema of an answer that may also be a failure, which has a `code`: clients check failures against it too.
fn or_failure(mut schema: JsonObject) -> JsonObject {
    let required = schema.remove("required").unwrap_or_else(|| json!([]));
    let code = json!({ "type": "string", "description": "Which failure it is, where the call failed." });
    let alternatives = json!([{ "required": required }, { "properties": { "code": code }, "required": ["code"] }]);
    schema.insert("anyOf".into(), alternatives);
    schema
}

fn object(schema: Value) -> JsonObject {
    match schema {
        Value::Object(schema) => schema,
        _ => JsonObject::new(),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn every_tool_takes_and_answers_objects_with_described_members() {
        for tool in Tool::ALL {
            let listed = serde_json::to_value(listed(tool)).unwrap();
            for (schema, anything) in [("inputSchema", true), ("outputSchema", false)] {
                let schema = &listed[schema];
                assert_eq!(schema["type"], "object", "{}: {schema}", tool.name());
                let none = serde_json::Map::new();
                let members = schema["properties"].as_object().unwrap_or(&none);
                assert!(anything || !members.is_empty(), "{}: {schema}", tool.name());
                for (name, member) in members {
                    assert!(member["description"].is_string(), "{} {name}: {member}", tool.name());
                }
            }
        }
    }
}
