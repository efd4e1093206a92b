//! The description of the API for programs: OpenAPI 3.1, made once from the router's table, the types on the wire and
//! the schemas of the tools. It answers nothing itself; that it tells the truth is for tests to see, all of which
//! compare the answers that they get with it.

mod failures;
mod operation;
mod routes;

use std::sync::LazyLock;

use bytes::Bytes;
use schemars::JsonSchema;
use schemars::generate::{SchemaGenerator, SchemaSettings};
use serde_json::{Map, Value, json};

use self::operation::Caller;
use super::json_line;
use crate::edge::router::TABLE;
use crate::protocol::rest::{DIRECT_TRANSPORT, ErrorBody, KEY_SUITE, SECURITY_PROFILE};
use crate::tools::{Tool, forget_widths};

const ABOUT: &str = "Runs commands, keeps processes and moves files on remote machines. Every answer carries \
    `X-Request-Id`: that of the request where it brought a usable one. An error has a code, which programs go by; \
    those that an operation may answer are listed with their status. 429 and 503 say with `Retry-After` when another \
    try is worthwhile. A path that is not here answers 404 `not_found`, a method that is not here 405 \
    `method_not_allowed` with `Allow`, a head that is too long 431.";

/// The document as JSON, the same bytes each time.
pub fn text() -> Bytes {
    static TEXT: LazyLock<Bytes> = LazyLock::new(|| json_line(&document()).into());
    TEXT.clone()
}

/// The document.
pub fn document() -> Value {
    let mut schemas = Schemas::new();
    let mut paths = Map::new();
    for row in TABLE {
        let operation = routes::operation(row.route, &mut schemas);
        for (alias, path) in row.paths.iter().enumerate() {
            let item = paths.entry(*path).or_insert_with(|| json!({}));
            for method in row.methods {
                item[method.as_str().to_ascii_lowercase()] = operation.told(row, alias, path, method);
            }
        }
    }
    let mut document = json!({
        "openapi": "3.1.0",
        "jsonSchemaDialect": "https://json-schema.org/draft/2020-12/schema",
        "info": {
            "title": "exec-gateway",
            "version": env!("CARGO_PKG_VERSION"),
            "license": { "name": env!("CARGO_PKG_LICENSE"), "identifier": env!("CARGO_PKG_LICENSE") },
            "description": ABOUT,
        },
        "tags": operation::tags(),
        "paths": paths,
        "components": {
            "securitySchemes": Caller::schemes(),
            "headers": operation::headers(),
            "schemas": schemas.told(),
        },
    });
    plain(&mut document);
    document
}

/// The shapes of bodies: those of requests as they are read, those of answers as they are written.
struct Schemas {
    requests: SchemaGenerator,
    answers: SchemaGenerator,
    others: Map<String, Value>,
}

impl Schemas {
    fn new() -> Self {
        let settings = || {
            SchemaSettings::draft2020_12().with(|settings| {
                settings.meta_schema = None;
                settings.definitions_path = "/components/schemas".into();
            })
        };
        let mut schemas = Self {
            requests: settings().for_deserialize().into_generator(),
            answers: settings().for_serialize().into_generator(),
            others: Map::new(),
        };
        schemas.answers.subschema_for::<ErrorBody>();
        let mut other = |name: &str, schema: Value| schemas.others.insert(name.into(), schema);
        other("MessageError", object(json!({ "error": { "type": "string" } })));
        let code = json!({ "code": { "type": "integer" }, "message": { "type": "string" } });
        let mut of_rpc = object(json!({ "jsonrpc": { "const": "2.0" }, "error": object(code) }));
        of_rpc["properties"]["id"] = json!({ "type": ["string", "integer", "null"] });
        other("RpcError", of_rpc);
        for tool in Tool::ALL {
            other(&format!("{}.arguments", tool.name()), tool.input_schema());
            other(&format!("{}.answer", tool.name()), tool.output_schema());
        }
        schemas
    }

    /// A body that is read as `T`.
    fn request<T: JsonSchema>(&mut self) -> Value {
        self.requests.subschema_for::<T>().to_value()
    }

    /// A body that is written from `T`.
    fn answer<T: JsonSchema>(&mut self) -> Value {
        self.answers.subschema_for::<T>().to_value()
    }

    /// All that are referred to by name.
    fn told(mut self) -> Map<String, Value> {
        let mut all = self.requests.take_definitions(true);
        for (name, schema) in self.answers.take_definitions(true).into_iter().chain(self.others) {
            if let Some(other) = all.insert(name.clone(), schema) {
                assert_eq!(other, all[&name], "{name}: read and written in the same shape");
            }
        }
        all
    }
}

/// The schema of an object that has all of these members.
fn object(members: Value) -> Value {
    let names: Vec<String> = members.as_object().into_iter().flat_map(Map::keys).cloned().collect();
    json!({ "type": "object", "properties": members, "required": names })
}

fn reference(name: &str) -> Value {
    json!({ "$ref": format!("#/components/schemas/{name}") })
}

/// Takes out what is for readers of the source: links between its items, and names of widths of numbers.
fn plain(value: &mut Value) {
    bound_widths(value);
    forget_widths(value);
    fn words(value: &mut Value) {
        match value {
            Value::Object(members) => {
                if let Some(Value::String(text)) = members.get_mut("description") {
                    let values = [
                        ("KEY_SUITE", KEY_SUITE),
                        ("SECURITY_PROFILE", SECURITY_PROFILE),
                        ("DIRECT_TRANSPORT", DIRECT_TRANSPORT),
                    ];
                    for (name, value) in values {
                        *text = text.replace(&format!("[`{name}`]"), &format!("`{value}`"));
                    }
                    *text = text.replace("[`", "`").replace("`]", "`");
                }
                members.values_mut().for_each(words);
            }
            Value::Array(values) => values.iter_mut().for_each(words),
            Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
        }
    }
    words(value);
}

/// What does not fit into a number of the gateway's is refused.
fn bound_widths(value: &mut Value) {
    match value {
        Value::Object(members) => {
            let bounds = match members.get("format").and_then(Value::as_str) {
                Some("uint32") => Some((json!(0), json!(u32::MAX))),
                Some("uint64") => Some((json!(0), json!(u64::MAX))),
                Some("int32") => Some((json!(i32::MIN), json!(i32::MAX))),
                Some("int64") => Some((json!(i64::MIN), json!(i64::MAX))),
                _ => None,
            };
            if let Some((min, max)) = bounds {
                members.entry("minimum").or_insert(min);
                members.entry("maximum").or_insert(max);
            }
            members.values_mut().for_each(bound_widths);
        }
        Value::Array(values) => values.iter_mut().for_each(bound_widths),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn the_document_has_each_operation_of_the_router_and_no_other() {
        let document = document();
        let told: BTreeSet<(String, String)> = document["paths"]
            .as_object()
            .unwrap()
            .iter()
            .flat_map(|(path, item)| item.as_object().unwrap().keys().map(move |method| (path.clone(), method.clone())))
            .collect();
        let routed = TABLE.iter().flat_map(|row| {
            let methods = row.methods.iter().map(|method| method.as_str().to_ascii_lowercase());
            methods.flat_map(|method| row.paths.iter().map(move |path| ((*path).to_owned(), method.clone())))
        });
        assert_eq!(told, routed.collect());
    }

    #[test]
    fn every_operation_has_a_name_of_its_own_and_says_who_may_call_it_and_every_parameter_of_its_path() {
        let document = document();
        let mut names = BTreeSet::new();
        for (path, item) in document["paths"].as_object().unwrap() {
            for operation in item.as_object().unwrap().values() {
                assert!(names.insert(operation["operationId"].as_str().unwrap().to_owned()), "{path}");
                assert!(operation["security"].is_array(), "{path}");
                let parameters = operation["parameters"].as_array().unwrap();
                let of_path = parameters.iter().filter(|parameter| parameter["in"] == "path");
                let in_path: Vec<_> =
                    of_path.map(|parameter| format!("{{{}}}", parameter["name"].as_str().unwrap())).collect();
                assert_eq!(in_path.len(), path.matches('{').count(), "{path}");
                assert!(in_path.iter().all(|parameter| path.contains(parameter)), "{path}");
            }
        }
    }

    #[test]
    fn every_reference_leads_somewhere_and_no_words_are_for_readers_of_the_source() {
        fn references(value: &Value, found: &mut Vec<String>) {
            match value {
                Value::Object(members) => {
                    found.extend(members.get("$ref").and_then(Value::as_str).map(ToOwned::to_owned));
                    members.values().for_each(|value| references(value, found));
                }
                Value::Array(values) => values.iter().for_each(|value| references(value, found)),
                _ => {}
            }
        }
        let document = document();
        let mut found = Vec::new();
        references(&document, &mut found);
        assert!(found.len() > 100);
        for reference in found {
            assert!(document.pointer(reference.strip_prefix('#').unwrap()).is_some(), "{reference}");
        }
        let text = document.to_string();
        assert!(!text.contains("[`") && !text.contains("`Debug`"));
    }
}
