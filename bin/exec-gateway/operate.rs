//! The operator commands: send one request to the running daemon or the store, print the response. They decide nothing
//! themselves, and what they print on stdout is the only place where a new secret is ever shown.

use exec_gateway::admin::Request;
use exec_gateway::config::Config;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::show::print;
use crate::table::Table;

/// Carries one request out and prints what came of it.
///
/// # Errors
/// The request was refused, or neither a daemon nor the store answered.
pub fn run(config: Config, request: Request, json: bool) -> anyhow::Result<()> {
    let response = call(&config, request)?;
    print(&if json { format!("{:#}\n", as_json(&response)) } else { as_text(&response) })
}

fn call(_config: &Config, _request: Request) -> anyhow::Result<Response> {
    anyhow::bail!("this build has no store")
}

/// What came of a request.
#[derive(Serialize, Deserialize)]
enum Response {
    Token { id: String, token: String, workspace: String, user: Option<String>, expires_at: Option<Value> },
    Tokens(Vec<Value>),
    ExecutorCreated { exe_id: String, token: String, workspace: String, name: String, command: String },
    Executors(Vec<Value>),
    CapToken { token: String },
    Done,
}

fn as_json(response: &Response) -> Value {
    match response {
        Response::Token { id, token, workspace, user, expires_at } => {
            json!({ "id": id, "token": token, "workspace": workspace, "user": user, "expires_at": expires_at })
        }
        Response::ExecutorCreated { exe_id, token, workspace, name, command } => {
            json!({ "exe_id": exe_id, "token": token, "workspace": workspace, "name": name, "command": command })
        }
        Response::Tokens(tokens) => json!(tokens),
        Response::Executors(executors) => json!(executors),
        Response::CapToken { token } => json!({ "token": token }),
        Response::Done => json!({ "ok": true }),
    }
}

/// A secret that was asked for stands alone, so that `$(exec-gateway token create …)` is the token.
fn as_text(response: &Response) -> String {
    match response {
        Response::Token { token, .. } | Response::CapToken { token } => format!("{token}\n"),
        Response::ExecutorCreated { exe_id, workspace, name, command, .. } => format!(
            "Executor {exe_id} is \"{name}\" in workspace {workspace}.\n\
             The command below connects it. It holds its token, which is shown this once:\n\n{command}\n"
        ),
        Response::Tokens(tokens) => listed(&json!(tokens)),
        Response::Executors(executors) => listed(&json!(executors)),
        Response::Done => String::new(),
    }
}

/// A list of objects as a table. An empty one prints nothing, so that lines can be counted.
fn listed(items: &Value) -> String {
    const FIRST: [&str; 5] = ["id", "exe_id", "workspace", "name", "user"];
    let objects: Vec<_> = items.as_array().into_iter().flatten().filter_map(Value::as_object).collect();
    let mut columns: Vec<&str> = Vec::new();
    for key in FIRST.into_iter().chain(objects.iter().flat_map(|object| object.keys().map(String::as_str))) {
        if !columns.contains(&key) && objects.iter().any(|object| object.contains_key(key)) {
            columns.push(key);
        }
    }
    if columns.is_empty() {
        return String::new();
    }
    let mut table = Table::new(columns.iter().map(|column| column.to_uppercase()).collect());
    for object in objects {
        table.row(columns.iter().map(|column| cell(object.get(*column).unwrap_or(&Value::Null))).collect());
    }
    table.to_string()
}

fn cell(value: &Value) -> String {
    match value {
        Value::Null => "-".into(),
        Value::Bool(yes) => if *yes { "yes" } else { "no" }.into(),
        Value::String(text) => text.clone(),
        Value::Number(number) => number.to_string(),
        Value::Array(items) if items.is_empty() => "-".into(),
        Value::Array(items) => items.iter().map(cell).collect::<Vec<_>>().join(", "),
        Value::Object(fields) => {
            fields.iter().map(|(key, value)| format!("{key}={}", cell(value))).collect::<Vec<_>>().join(" ")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_new_token_is_printed_alone_and_in_full_with_json() {
        let token = Response::Token {
            id: "tok_1".into(),
            token: "egw_x".into(),
            workspace: "w".into(),
            user: None,
            expires_at: None,
        };
        assert_eq!(as_text(&token), "egw_x\n");
        let wanted = json!({ "id": "tok_1", "token": "egw_x", "workspace": "w", "user": null, "expires_at": null });
        assert_eq!(as_json(&token), wanted);
    }

    #[test]
    fn the_last_line_of_a_new_executor_is_its_command() {
        let executor = Response::ExecutorCreated {
            exe_id: "exe_1".into(),
            token: "egx_x".into(),
            workspace: "w".into(),
            name: "box".into(),
            command: "connect me".into(),
        };
        assert_eq!(as_text(&executor).lines().last(), Some("connect me"));
        assert_eq!(as_json(&executor)["exe_id"], "exe_1");
    }

    #[test]
    fn a_list_is_a_table_with_ids_first_and_an_array_with_json() {
        let tokens = Response::Tokens(vec![
            json!({ "expires_at": "2030-01-01", "id": "tok_1", "read_only": true, "workspace": "a" }),
            json!({ "expires_at": null, "id": "tok_22", "read_only": false, "workspace": "b" }),
        ]);
        assert_eq!(
            as_text(&tokens),
            "ID      WORKSPACE  EXPIRES_AT  READ_ONLY\n\
             tok_1   a          2030-01-01  yes\n\
             tok_22  b          -           no\n"
        );
        assert_eq!(as_json(&tokens)[1]["id"], "tok_22");
        assert_eq!(as_text(&Response::Executors(vec![])), "");
    }
}
