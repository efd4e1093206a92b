//! Cut: an answer in the size that a model reads. Whoever needs the rest is told how to ask for it.

use serde_json::Value;

use crate::protocol::rest::{Content, ToolResult};

/// The result with every text in it cut in the middle to `bytes_max`. Bytes in base64 would be spoiled by that: they are
/// refused instead.
pub(super) fn cut(mut result: ToolResult, bytes_max: usize) -> ToolResult {
    let longest = result.content.iter().map(|Content::Text { text }| text.len()).max().unwrap_or(0);
    let is_base64 = result.structured_content.as_ref().is_some_and(|content| content["encoding"] == "base64");
    if is_base64 && longest > bytes_max {
        let message = format!(
            "the answer has {longest} bytes of base64 and {bytes_max} are shown at once; read slices of at most {} bytes \
             by offset and limit",
            bytes_max / 4 * 3
        );
        let structured = serde_json::json!({ "code": "too_large" });
        return ToolResult { structured_content: Some(structured), ..ToolResult::error(message) };
    }
    for Content::Text { text } in &mut result.content {
        cut_text(text, bytes_max);
    }
    if let Some(content) = &mut result.structured_content {
        cut_value(content, bytes_max);
    }
    result
}

fn cut_value(value: &mut Value, bytes_max: usize) {
    match value {
        Value::String(text) => cut_text(text, bytes_max),
        Value::Array(values) => values.iter_mut().for_each(|value| cut_value(value, bytes_max)),
        Value::Object(members) => members.values_mut().for_each(|value| cut_value(value, bytes_max)),
        Value::Null | Value::Bool(_) | Value::Number(_) => {}
    }
}

fn cut_text(text: &mut String, bytes_max: usize) {
    // What a tool has cut to the bound itself says so in a line or two more.
    if text.len() <= bytes_max + bytes_max / 8 {
        return;
    }
    let (head, tail) = crate::tools::head_and_tail(text, bytes_max);
    let left_out = text.len() - head.len() - tail.len();
    *text = format!("{head}\n[{left_out} bytes left out here; ask for less at once to see them]\n{tail}");
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn long_texts_keep_both_ends_and_short_ones_all() {
        let long = format!("begin{}end", "x".repeat(10_000));
        let result = ToolResult {
            structured_content: Some(json!({ "lines": [long, "short"], "size": 3 })),
            ..ToolResult::text(long.clone())
        };
        let result = cut(result, 1024);
        let [Content::Text { text }] = &result.content[..] else { panic!("one text: {result:?}") };
        assert!(text.starts_with("begin") && text.ends_with("end") && text.len() < 1200, "{text}");
        assert!(text.contains("[8984 bytes left out here;"), "{text}");
        let content = result.structured_content.unwrap_or_default();
        assert_eq!((&content["lines"][0], &content["lines"][1]), (&json!(text), &json!("short")));
    }

    #[test]
    fn base64_is_whole_or_refused() {
        let bytes = |len: usize| ToolResult {
            structured_content: Some(json!({ "encoding": "base64" })),
            ..ToolResult::text("A".repeat(len))
        };
        assert_eq!(cut(bytes(1024), 1024), bytes(1024));
        assert_eq!(cut(bytes(1028), 1024).structured_content, Some(json!({ "code": "too_large" })));
    }
}
