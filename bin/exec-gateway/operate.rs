//! The operator commands: send one request to the running daemon or the store, print the response. They decide nothing
//! themselves, and what they print on stdout is the only place where a new secret is ever shown.

use anyhow::Context;
use exec_gateway::admin::{AdminSettings, Request, execute};
use exec_gateway::config::Config;
use serde_json::Value;

use crate::show::print;
use crate::table::Table;

/// Carries one request out and prints what came of it.
///
/// # Errors
/// The request was refused, or neither a daemon nor the store answered.
pub fn run(config: Config, request: Request, json: bool) -> anyhow::Result<()> {
    let answer = call(&config, request)?;
    print(&if json { format!("{answer:#}\n") } else { as_text(&answer) })
}

/// The fields of the response, secrets included, or null where there is nothing to tell.
fn call(config: &Config, request: Request) -> anyhow::Result<Value> {
    let settings = AdminSettings {
        public_url: config.public_url.clone(),
        listen: config.listen.first().copied().unwrap_or(config.ops_listen),
        revocations_max: config.auth.revocations_max,
        audit: config.audit.clone(),
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("no runtime")?;
    let response = runtime.block_on(execute(&config.state_dir()?, settings, request))?;
    Ok(response.json())
}

/// A secret that was asked for stands alone, so that `$(exec-gateway token create …)` is the token.
fn as_text(answer: &Value) -> String {
    let field = |name: &str| answer[name].as_str();
    match (answer, field("command"), field("token")) {
        (Value::Array(items), ..) => listed(items),
        (_, Some(command), _) => format!(
            "Executor {} is \"{}\" in workspace {}.\n\
             The command below connects it. It holds its token, which is shown this once:\n\n{command}\n",
            cell(&answer["exe_id"]),
            cell(&answer["name"]),
            cell(&answer["workspace"]),
        ),
        (_, None, Some(token)) => format!("{token}\n"),
        (_, None, None) => String::new(),
    }
}

/// A list of objects as a table. An empty one prints nothing, so that lines can be counted.
fn listed(items: &[Value]) -> String {
    const FIRST: [&str; 5] = ["id", "exe_id", "workspace", "name", "user"];
    let objects: Vec<_> = items.iter().filter_map(Value::as_object).collect();
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
        // The only objects in lists are bindings.
        Value::Object(binding) => {
            let part = |name: &str| binding.get(name).map(cell).unwrap_or_default();
            let default = if binding.get("default") == Some(&Value::Bool(true)) { " (default)" } else { "" };
            format!("{}/{}{default}", part("workspace"), part("name"))
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_new_token_stands_alone() {
        let token = json!({ "id": "tok_1", "token": "egw_x", "workspace": "w", "user": null, "expires_at": null });
        assert_eq!(as_text(&token), "egw_x\n");
        assert_eq!(as_text(&json!({ "token": "cap" })), "cap\n");
    }

    #[test]
    fn the_last_line_of_a_new_executor_is_its_command() {
        let executor = json!({
            "exe_id": "exe_1", "token": "egx_x", "workspace": "w", "name": "box", "command": "connect me"
        });
        let text = as_text(&executor);
        assert!(text.starts_with("Executor exe_1 is \"box\" in workspace w.\n"), "{text}");
        assert_eq!(text.lines().last(), Some("connect me"));
    }

    #[test]
    fn a_list_is_a_table_with_ids_first() {
        let tokens = json!([
            { "expires_at": "2030-01-01", "id": "tok_1", "read_only": true, "workspace": "a" },
            { "expires_at": null, "id": "tok_22", "read_only": false, "workspace": "b" },
        ]);
        assert_eq!(
            as_text(&tokens),
            "ID      WORKSPACE  EXPIRES_AT  READ_ONLY\n\
             tok_1   a          2030-01-01  yes\n\
             tok_22  b          -           no\n"
        );
    }

    #[test]
    fn bindings_are_shown_in_the_row_of_their_executor() {
        let executors = json!([{ "exe_id": "exe_1", "bindings": [
            { "workspace": "a", "name": "box", "default": true }, { "workspace": "b", "name": "pc", "default": false },
        ] }]);
        assert_eq!(as_text(&executors), "EXE_ID  BINDINGS\nexe_1   a/box (default), b/pc\n");
    }

    #[test]
    fn nothing_to_tell_prints_nothing() {
        assert_eq!(as_text(&Value::Null), "");
        assert_eq!(as_text(&json!([])), "");
    }
}
