//! The page `deploy/METRICS.md`, made of the table.

use super::{Kind, Label, Metric, TABLE, Unit, Values};

const HEAD: &str = "\
# Metrics

What `GET /metrics` on the operators' listener prints, in the text format of OpenMetrics. Made by
`exec-gateway generate metrics` of the program's own table. Seconds and bytes throughout; counters begin at zero with
the process. No label holds an id, a path or the name of a workspace.
";

impl Metric {
    /// Every metric for people, in Markdown.
    pub fn page() -> String {
        let (mut page, mut section) = (HEAD.to_owned(), "");
        for metric in TABLE {
            if metric.section != section {
                section = metric.section;
                page += &format!("\n## {section}\n\n| metric | kind | labels | meaning |\n|---|---|---|---|\n");
            }
            page += &metric.line();
        }
        page
    }

    fn line(&self) -> String {
        let kind = match (self.kind, self.unit) {
            (Kind::Counter, _) => "counter",
            (Kind::Gauge, Unit::None) => "gauge",
            (Kind::Gauge, Unit::Bytes) => "gauge, bytes",
            (Kind::Gauge, Unit::Seconds) => "gauge, seconds",
            (Kind::Histogram, _) => "histogram",
        };
        let labels: Vec<String> = self.labels.iter().map(Label::text).collect();
        format!("| `{}` | {kind} | {} | {} |\n", self.name(), labels.join("; "), self.help())
    }
}

impl Label {
    fn text(&self) -> String {
        let values = match self.values {
            Values::Words(words) => words.iter().map(|word| format!("`{word}`")).collect::<Vec<_>>().join(", "),
            Values::Rule(rule) => rule.into(),
        };
        format!("**{}**: {values}", self.name)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::collections::HashSet;
    use std::fs;
    use std::path::Path;

    use regex::Regex;
    use serde_json::Value;

    use super::*;

    /// `REWRITE=1 cargo test` brings the file up to date after a change of the table.
    #[test]
    fn the_page_in_deploy_tells_of_every_metric() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy/METRICS.md");
        if std::env::var_os("REWRITE").is_some() {
            fs::write(&path, Metric::page()).unwrap();
        }
        let text = fs::read_to_string(path).unwrap_or_default();
        assert!(text == Metric::page(), "deploy/METRICS.md is out of date: run this test with REWRITE=1");
    }

    /// Labels that Prometheus itself puts in.
    const LABELS_OF_ALL: [&str; 3] = ["instance", "job", "le"];

    fn deploy(file: &str) -> String {
        fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy").join(file)).unwrap()
    }

    /// The row of a series by its name.
    fn row(series: &str) -> Option<&'static Metric> {
        TABLE.iter().find(|metric| {
            let name = metric.name();
            let histogram = metric.kind == Kind::Histogram;
            let of_histogram = |rest: &str| histogram && ["_bucket", "_sum", "_count"].contains(&rest);
            series.strip_prefix(&name).is_some_and(|rest| (rest.is_empty() && !histogram) || of_histogram(rest))
        })
    }

    /// What is wrong with a query and the labels that its legend names.
    fn faults(query: &str, legend: &str) -> Vec<String> {
        let of = |pattern: &str| Regex::new(pattern).unwrap();
        let (mut faults, mut labels) = (Vec::new(), LABELS_OF_ALL.to_vec());
        for series in of(r"\b(?:exec_gateway|process)_\w+").find_iter(query) {
            match row(series.as_str()) {
                Some(row) => labels.extend(row.labels.iter().map(|label| label.name)),
                None => faults.push(format!("no such metric: {}", series.as_str())),
            }
        }
        for selector in of(r"(\w+)\{([^}]*)\}").captures_iter(query) {
            let known = row(&selector[1]).map_or(&[][..], |row| row.labels);
            for matcher in of(r#"(\w+)(=~|!~|!=|=)"([^"]*)""#).captures_iter(&selector[2]) {
                let label = known.iter().find(|label| label.name == &matcher[1]);
                if label.is_none() && !LABELS_OF_ALL.contains(&&matcher[1]) {
                    faults.push(format!("no such label: {}", &matcher[0]));
                }
                let words = label.and_then(|label| label.values.words());
                if words.is_some_and(|words| !matcher[3].split('|').all(|value| words.contains(&value))) {
                    faults.push(format!("no such value: {}", &matcher[0]));
                }
            }
        }
        let grouped = of(r"\bby \(([^)]*)\)");
        let grouped =
            grouped.captures_iter(query).flat_map(|by| by[1].split(", ").map(str::to_owned).collect::<Vec<_>>());
        let shown = of(r"\{\{ *(?:\$labels\.)?(\w+) *\}\}");
        let shown = shown.captures_iter(legend).map(|label| label[1].to_owned());
        faults.extend(
            grouped.chain(shown).filter(|name| !labels.contains(&name.as_str())).map(|name| format!("by {name}")),
        );
        faults
    }

    #[test]
    fn the_dashboard_asks_for_nothing_that_is_not_there() {
        let dashboard: Value = serde_json::from_str(&deploy("grafana-dashboard.json")).unwrap();
        let panels = dashboard["panels"].as_array().unwrap();
        let targets = panels.iter().filter_map(|panel| panel["targets"].as_array()).flatten();
        let (mut queries, mut asked) = (0, HashSet::new());
        for target in targets {
            let (query, legend) = (target["expr"].as_str().unwrap(), target["legendFormat"].as_str().unwrap());
            assert_eq!(faults(query, legend), Vec::<String>::new(), "{query}");
            asked.extend(TABLE.iter().map(Metric::name).filter(|name| query.contains(name.as_str())));
            queries += 1;
        }
        assert!(queries > 60, "{queries}");
        let unseen: Vec<String> = TABLE.iter().map(Metric::name).filter(|name| !asked.contains(name)).collect();
        assert!(unseen.len() < 5, "metrics that no panel shows: {unseen:?}");
    }

    #[test]
    fn alerts_ask_for_nothing_that_is_not_there_and_say_what_to_do() {
        let alerts = deploy("alerts.yml");
        let rules: Vec<&str> = alerts.split("- alert: ").skip(1).collect();
        for rule in &rules {
            let (query, rest) = rule.split_once("expr:").unwrap().1.split_once("for:").unwrap();
            assert_eq!(faults(query, rest), Vec::<String>::new(), "{rule}");
            for part in ["severity:", "summary:", "meaning:", "action:"] {
                assert!(rest.contains(part), "{part} is missing: {rule}");
            }
        }
        assert!(rules.len() > 10, "{}", rules.len());
    }

    #[test]
    fn a_query_for_what_is_not_there_is_found() {
        assert_eq!(faults("rate(exec_gateway_calls_total{tool=\"x\"}[5m])", "{{tool}}"), Vec::<String>::new());
        for (query, legend) in [
            ("exec_gateway_nothing", ""),
            ("exec_gateway_calls_total{verb=\"x\"}", ""),
            ("exec_gateway_links{transport=\"pigeon\"}", ""),
            ("sum by (tool) (exec_gateway_links)", ""),
            ("exec_gateway_links", "{{tool}}"),
            ("exec_gateway_call_duration_seconds", ""),
        ] {
            assert_eq!(faults(query, legend).len(), 1, "{query}");
        }
    }

    #[test]
    fn every_metric_has_a_name_of_its_own_and_a_sentence() {
        let mut names = HashSet::new();
        for metric in TABLE {
            assert!(names.insert(metric.name()), "{} stands there twice", metric.name());
            assert!(metric.help().ends_with('.') && !metric.help().contains('|'), "{}", metric.name());
            assert!(metric.kind != Kind::Histogram || metric.unit == Unit::Seconds, "{}", metric.name());
        }
    }
}
