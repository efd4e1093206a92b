//! The description of the API, held against what the gateway answers: every answer that any test gets is compared with
//! it, so the document cannot tell anything else than the doors.

use std::sync::LazyLock;

use exec_gateway::api::openapi;
use exec_gateway::edge::router::Router;
use hyper::Method;
use serde_json::Value;

use super::Answer;

/// The document that the gateway serves.
pub static DOCUMENT: LazyLock<Value> = LazyLock::new(openapi::document);

static ROUTER: LazyLock<Router> = LazyLock::new(Router::new);

/// What is not as the document has it, of an answer to this request; nothing where the path is none of the API's.
pub fn fault(method: &str, path: &str, answer: &Answer) -> Option<String> {
    // A head that is too long is answered before anybody looks where it goes.
    if answer.status == 431 {
        return None;
    }
    let path = path.split('?').next().unwrap_or_default();
    let (route, _) = ROUTER.find(&Method::from_bytes(method.as_bytes()).unwrap(), path).ok()?;
    let row = route.row();
    let operation = &DOCUMENT["paths"][row.paths[0]][method.to_ascii_lowercase()];
    let told = |what: String| Some(format!("{} does not describe {what}: {answer:?}", row.name));
    let Some(response) = operation["responses"].get(answer.status.as_str()) else {
        return told(format!("the status {}", answer.status));
    };
    for name in response["headers"].as_object().unwrap().keys() {
        // What every answer of that status has to carry.
        if ["X-Request-Id", "Server-Timing", "Retry-After"].contains(&name.as_str()) && answer.header(name).is_none() {
            return told(format!("an answer without {name}"));
        }
    }
    let media_type = answer.header("content-type").map(|value| value.split(';').next().unwrap_or_default());
    let contents = response.get("content");
    match (contents, media_type) {
        (None, _) if method == "HEAD" => None,
        (None, None) => (!answer.body.is_empty()).then(|| told("a body".into())).flatten(),
        (None, Some(_)) => told("a body".into()),
        (Some(_), None) => told("an answer without a media type".into()),
        (Some(contents), Some(media_type)) => {
            let Some(content) = contents.get(media_type) else { return told(format!("the media type {media_type}")) };
            if media_type != "application/json" {
                return None;
            }
            let Ok(body) = serde_json::from_slice::<Value>(&answer.body) else {
                return told("a body that is no JSON".into());
            };
            mismatch(&content["schema"], &body).and_then(told)
        }
    }
}

/// Where a value differs from a schema of the document. It knows the words that the document uses, and no other.
pub fn mismatch(schema: &Value, value: &Value) -> Option<String> {
    let Some(schema) = schema.as_object() else {
        return (*schema == Value::Bool(false)).then(|| format!("{value} where nothing may be"));
    };
    schema.iter().find_map(|(word, rule)| {
        let all = |schemas: &Value| {
            schemas.as_array().unwrap().iter().map(|schema| mismatch(schema, value)).collect::<Vec<_>>()
        };
        let fits = match word.as_str() {
            "$ref" => {
                let place = rule.as_str().unwrap().strip_prefix('#').unwrap();
                return mismatch(DOCUMENT.pointer(place).unwrap(), value);
            }
            "allOf" => return all(rule).into_iter().flatten().next(),
            "anyOf" => {
                let faults = all(rule);
                return faults
                    .iter()
                    .all(Option::is_some)
                    .then(|| format!("none of: {}", faults.iter().flatten().cloned().collect::<Vec<_>>().join("; ")));
            }
            "oneOf" => all(rule).iter().filter(|fault| fault.is_none()).count() == 1,
            "type" => match rule {
                Value::Array(types) => types.iter().any(|kind| is(kind, value)),
                kind => is(kind, value),
            },
            "const" => rule == value,
            "enum" => rule.as_array().unwrap().contains(value),
            "required" => match value.as_object() {
                Some(members) => {
                    rule.as_array().unwrap().iter().all(|name| members.contains_key(name.as_str().unwrap()))
                }
                None => true,
            },
            "properties" => {
                let members = rule.as_object().unwrap().iter();
                return members
                    .filter_map(|(name, schema)| Some((name, schema, value.get(name)?)))
                    .find_map(|(name, schema, value)| mismatch(schema, value).map(|fault| format!("{name}: {fault}")));
            }
            "additionalProperties" => {
                let told = schema.get("properties").and_then(Value::as_object);
                let others = value
                    .as_object()
                    .into_iter()
                    .flatten()
                    .filter(|(name, _)| told.is_none_or(|told| !told.contains_key(*name)));
                return others
                    .into_iter()
                    .find_map(|(name, value)| mismatch(rule, value).map(|fault| format!("{name}: {fault}")));
            }
            "items" => return value.as_array().into_iter().flatten().find_map(|value| mismatch(rule, value)),
            "minimum" => value.as_f64().is_none_or(|number| number >= rule.as_f64().unwrap()),
            "minLength" => value.as_str().is_none_or(|text| text.chars().count() as u64 >= rule.as_u64().unwrap()),
            // Of requests, or for readers.
            "pattern" | "description" | "title" | "default" | "maximum" | "maxLength" | "examples" => true,
            other => panic!("the document's schemas use {other}"),
        };
        (!fits).then(|| format!("{value} is not of {word} {rule}"))
    })
}

fn is(kind: &Value, value: &Value) -> bool {
    match kind.as_str().unwrap() {
        "null" => value.is_null(),
        "boolean" => value.is_boolean(),
        "integer" => value.is_i64() || value.is_u64(),
        "number" => value.is_number(),
        "string" => value.is_string(),
        "array" => value.is_array(),
        "object" => value.is_object(),
        other => panic!("the document's schemas use the type {other}"),
    }
}
