//! Method and path → door: every endpoint of the gateway in one list.

use std::collections::BTreeMap;

use hyper::Method;
use matchit::{Match, Params};

/// What an API request asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Route {
    /// The environments of a workspace.
    EnvList,
    /// One tool call.
    ToolCall,
    /// The content of a file.
    FileGet,
    /// A new content for a file.
    FilePut,
    /// The process sessions of a workspace.
    ProcessList,
    /// One process session.
    ProcessShow,
    /// A process session is ended and forgotten.
    ProcessForget,
    /// Output of a process session.
    ProcessOutput,
    /// A caller attaches to a process session.
    ProcessAttach,
    /// Input for a process session.
    ProcessStdin,
    /// A process session is to end.
    ProcessTerminate,
    /// An executor registers: codex.
    RegisterCodex,
    /// An executor registers: agentx.
    RegisterAgentx,
    /// An executor registers: codex on its direct transport.
    RegisterDirect,
    /// An executor asks whether to trust a harness.
    Validate,
    /// A harness asks for the way to an encrypted executor.
    Connect,
    /// An executor or a harness opens its socket.
    Bridge,
    /// A registered executor opens its socket.
    CloudRelay,
    /// A service asks who is connected.
    Connected,
    /// A service ends a turn.
    RevokeTurn,
    /// A service makes an executor.
    ExecutorRegister,
    /// A service deletes an executor.
    ExecutorDelete,
    /// A service binds an executor.
    ExecutorBind,
    /// A service lists the executors of a workspace.
    ExecutorsBound,
    /// A service unbinds an executor.
    ExecutorUnbind,
    /// A message of an MCP client.
    Mcp,
    /// An MCP client asks how to come by a token.
    ProtectedResource,
    /// A service makes a transfer.
    TransferCreate,
    /// The sending side of a transfer.
    TransferPut,
    /// The receiving side of a transfer.
    TransferGet,
    /// The gateway is alive.
    Health,
}

/// How errors of a route are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Envelope {
    /// `{"error":{"code","message"}}`
    Json,
    /// `{"error":"message"}`
    Message,
    /// `{"jsonrpc":"2.0","error":{"code","message","data"}}`
    Rpc,
    /// The message alone.
    Text,
}

impl Route {
    /// Their names in metrics, in their order; the first is that of no route.
    pub const NAMES: &[&str] = &[
        "none",
        "env_list",
        "tool_call",
        "file_get",
        "file_put",
        "process_list",
        "process_show",
        "process_forget",
        "process_output",
        "process_attach",
        "process_stdin",
        "process_terminate",
        "register_codex",
        "register_agentx",
        "register_direct",
        "validate",
        "connect",
        "bridge",
        "cloud_relay",
        "connected",
        "revoke_turn",
        "executor_register",
        "executor_delete",
        "executor_bind",
        "executors_bound",
        "executor_unbind",
        "mcp",
        "protected_resource",
        "transfer_create",
        "transfer_put",
        "transfer_get",
        "health",
    ];

    /// Its name in metrics.
    pub fn name(self) -> &'static str {
        Self::NAMES[1 + self as usize]
    }

    /// How errors of this route are written: WebSocket doors speak plain text (connectors-api.md §2.4), those of
    /// services a text in JSON (§2.6, §2.7).
    pub fn envelope(self) -> Envelope {
        match self {
            Self::Bridge | Self::CloudRelay | Self::Health => Envelope::Text,
            Self::Connected
            | Self::RevokeTurn
            | Self::ExecutorRegister
            | Self::ExecutorDelete
            | Self::ExecutorBind
            | Self::ExecutorsBound
            | Self::ExecutorUnbind
            | Self::TransferCreate
            | Self::TransferPut
            | Self::TransferGet => Envelope::Message,
            Self::EnvList
            | Self::ToolCall
            | Self::FileGet
            | Self::FilePut
            | Self::ProcessList
            | Self::ProcessShow
            | Self::ProcessForget
            | Self::ProcessOutput
            | Self::ProcessAttach
            | Self::ProcessStdin
            | Self::ProcessTerminate
            | Self::RegisterCodex
            | Self::RegisterAgentx
            | Self::RegisterDirect
            | Self::Validate
            | Self::Connect
            | Self::ProtectedResource => Envelope::Json,
            Self::Mcp => Envelope::Rpc,
        }
    }

    /// The door by which a request came whose answer says where its time went.
    pub fn timed_door(self) -> Option<&'static str> {
        match self {
            Self::EnvList | Self::ToolCall => Some("rest"),
            Self::FileGet | Self::FilePut => Some("files"),
            Self::ProcessList
            | Self::ProcessShow
            | Self::ProcessForget
            | Self::ProcessOutput
            | Self::ProcessStdin
            | Self::ProcessTerminate => Some("processes"),
            Self::Mcp => Some("mcp"),
            Self::ProcessAttach
            | Self::RegisterCodex
            | Self::RegisterAgentx
            | Self::RegisterDirect
            | Self::Validate
            | Self::Connect
            | Self::Bridge
            | Self::CloudRelay
            | Self::Connected
            | Self::RevokeTurn
            | Self::ExecutorRegister
            | Self::ExecutorDelete
            | Self::ExecutorBind
            | Self::ExecutorsBound
            | Self::ExecutorUnbind
            | Self::TransferCreate
            | Self::TransferPut
            | Self::TransferGet
            | Self::ProtectedResource
            | Self::Health => None,
        }
    }
}

/// Why a request has no route.
#[derive(Debug, PartialEq, Eq)]
pub enum RouteError {
    /// No such path.
    NotFound,
    /// The path exists for other methods, which this lists.
    Method(String),
}

/// The table of contents of the API.
pub struct Router(matchit::Router<Vec<(Method, Route)>>);

impl Router {
    /// Every endpoint.
    pub fn new() -> Self {
        let mut table: BTreeMap<String, Vec<(Method, Route)>> = BTreeMap::new();
        let mut add = |method: Method, path: &str, route: Route| {
            table.entry(path.to_owned()).or_default().push((method, route));
        };
        // The older Python client still calls /api/sdk.
        for base in ["/api/connectors", "/api/sdk"] {
            add(Method::POST, &format!("{base}/envs/list"), Route::EnvList);
            add(Method::POST, &format!("{base}/envs/{{name}}/tool/call"), Route::ToolCall);
            add(Method::GET, &format!("{base}/envs/{{name}}/files"), Route::FileGet);
            add(Method::PUT, &format!("{base}/envs/{{name}}/files"), Route::FilePut);
            add(Method::GET, &format!("{base}/processes"), Route::ProcessList);
            add(Method::GET, &format!("{base}/processes/{{sid}}"), Route::ProcessShow);
            add(Method::DELETE, &format!("{base}/processes/{{sid}}"), Route::ProcessForget);
            add(Method::GET, &format!("{base}/processes/{{sid}}/output"), Route::ProcessOutput);
            add(Method::GET, &format!("{base}/processes/{{sid}}/attach"), Route::ProcessAttach);
            add(Method::POST, &format!("{base}/processes/{{sid}}/stdin"), Route::ProcessStdin);
            add(Method::POST, &format!("{base}/processes/{{sid}}/terminate"), Route::ProcessTerminate);
        }
        add(Method::POST, "/cloud/environment/{id}/register", Route::RegisterCodex);
        add(Method::POST, "/cloud/executor/{id}/register", Route::RegisterCodex);
        add(Method::POST, "/agentx/environment/{id}/register", Route::RegisterAgentx);
        add(Method::POST, "/cloud/environment/{id}/direct/register", Route::RegisterDirect);
        add(Method::POST, "/cloud/environment/{id}/validate", Route::Validate);
        add(Method::POST, "/cloud/executor/{id}/validate", Route::Validate);
        add(Method::POST, "/cloud/environment/{id}/connect", Route::Connect);
        add(Method::GET, "/bridge/{id}", Route::Bridge);
        add(Method::GET, "/codex-exec/{id}", Route::Bridge);
        add(Method::GET, "/agentx/{id}", Route::Bridge);
        add(Method::GET, "/cloud/relay/{registration}", Route::CloudRelay);
        add(Method::GET, "/api/exec-gateway/connected", Route::Connected);
        add(Method::POST, "/api/exec-gateway/revoke-turn", Route::RevokeTurn);
        add(Method::POST, "/api/codex-exec/register", Route::ExecutorRegister);
        add(Method::DELETE, "/api/codex-exec/executors/{id}", Route::ExecutorDelete);
        add(Method::POST, "/api/codex-exec/workspaces/{wid}/executors", Route::ExecutorBind);
        add(Method::GET, "/api/codex-exec/workspaces/{wid}/executors", Route::ExecutorsBound);
        add(Method::DELETE, "/api/codex-exec/workspaces/{wid}/executors/{id}", Route::ExecutorUnbind);
        for path in ["/mcp", "/v1/mcp"] {
            add(Method::POST, path, Route::Mcp);
            add(Method::GET, &format!("/.well-known/oauth-protected-resource{path}"), Route::ProtectedResource);
        }
        add(Method::GET, "/.well-known/oauth-protected-resource", Route::ProtectedResource);
        // Where the original has it.
        add(Method::GET, "/v1/.well-known/oauth-protected-resource", Route::ProtectedResource);
        add(Method::POST, "/api/exec-gateway/relay/create", Route::TransferCreate);
        add(Method::PUT, "/relay/{ticket}", Route::TransferPut);
        add(Method::GET, "/relay/{ticket}", Route::TransferGet);
        add(Method::GET, "/healthz", Route::Health);
        let mut paths = matchit::Router::new();
        for (path, routes) in table {
            paths.insert(path, routes).expect("paths of the table do not conflict");
        }
        Self(paths)
    }

    /// The route of a request and the parameters of its path, percent-decoded and with `/` between them.
    ///
    /// # Errors
    /// [`RouteError`].
    pub fn find(&self, method: &Method, path: &str) -> Result<(Route, String), RouteError> {
        let Match { value: routes, params } = self.0.at(path).map_err(|_| RouteError::NotFound)?;
        let answers = |wanted: &Method, route: Route| {
            let has_head = matches!(route, Route::Health | Route::FileGet);
            wanted == method || (*wanted == Method::GET && *method == Method::HEAD && has_head)
        };
        let Some((_, route)) = routes.iter().find(|(wanted, route)| answers(wanted, *route)) else {
            let allowed: Vec<&str> = routes.iter().map(|(wanted, _)| wanted.as_str()).collect();
            return Err(RouteError::Method(allowed.join(", ")));
        };
        Ok((*route, parameter(&params).ok_or(RouteError::NotFound)?))
    }
}

impl Default for Router {
    fn default() -> Self {
        Self::new()
    }
}

fn parameter(params: &Params<'_, '_>) -> Option<String> {
    let decoded: Option<Vec<String>> = params.iter().map(|(_, value)| percent_decode(value)).collect();
    Some(decoded?.join("/"))
}

/// Decodes `%XX`; `None` where it is malformed or not UTF-8.
pub fn percent_decode(text: &str) -> Option<String> {
    if !text.contains('%') {
        return Some(text.to_owned());
    }
    let mut decoded = Vec::with_capacity(text.len());
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        if byte == b'%' {
            let high = char::from(bytes.next()?).to_digit(16)?;
            let low = char::from(bytes.next()?).to_digit(16)?;
            decoded.push(u8::try_from(high * 16 + low).ok()?);
        } else {
            decoded.push(byte);
        }
    }
    String::from_utf8(decoded).ok()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn the_older_clients_paths_lead_to_the_same_doors() {
        let router = Router::new();
        for base in ["/api/connectors", "/api/sdk"] {
            let found = router.find(&Method::POST, &format!("{base}/envs/my-mac/tool/call"));
            assert_eq!(found, Ok((Route::ToolCall, "my-mac".into())));
        }
    }

    #[test]
    fn every_route_has_its_name() {
        assert_eq!(Route::NAMES.len(), 2 + Route::Health as usize);
        let named = [Route::EnvList, Route::ProcessAttach, Route::Connect, Route::Mcp, Route::Health].map(Route::name);
        assert_eq!(named, ["env_list", "process_attach", "connect", "mcp", "health"]);
    }

    #[test]
    fn a_wrong_method_is_told_the_right_one() {
        assert_eq!(
            Router::new().find(&Method::GET, "/api/connectors/envs/list"),
            Err(RouteError::Method("POST".into()))
        );
        assert_eq!(Router::new().find(&Method::GET, "/nowhere"), Err(RouteError::NotFound));
    }

    #[test]
    fn names_are_percent_decoded_and_torn_escapes_refused() {
        assert_eq!(percent_decode("a%2Fb").as_deref(), Some("a/b"));
        assert_eq!(percent_decode("a%2"), None);
        assert_eq!(percent_decode("%ff"), None);
    }
}
