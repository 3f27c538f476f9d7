use super::*;
use serde_json::json;

fn tokens() -> BTreeMap<String, String> {
    [("bos_token", "<s>"), ("eos_token", "</s>")].map(|(name, text)| (name.to_owned(), text.to_owned())).into()
}

fn render(source: &str) -> Result<String, TemplateError> {
    let messages = [json!({"role": "user", "content": "Hi"}), json!({"role": "assistant", "content": "Yo"})];
    ChatTemplate::new(source, &tokens())?.render(&messages, None, true, &Map::new())
}

#[test]
fn whitespace_is_as_transformers_sets_it() {
    let source = "{{ bos_token }}\n{% for m in messages %}\n    {% if m.role == 'user' %}\n[{{ m['content'] }}]\n    {% endif %}\n{% endfor %}\n";
    assert_eq!(render(source).unwrap(), "<s>\n[Hi]\n");
}

#[test]
fn loop_controls_namespaces_and_string_methods_work() {
    let source = "{% set ns = namespace(n=0) %}{% for i in range(10) %}{% if i == 2 %}{% continue %}{% endif %}{% if i == 5 %}{% break %}{% endif %}{% set ns.n = ns.n + i %}{% endfor %}{{ ns.n }}|{{ ' a b '.strip().split(' ')[-1].upper() }}|{{ messages[-1].content.startswith('Y') }}|{% for k, v in messages[0].items() %}{{ k }}={{ v }};{% endfor %}";
    assert_eq!(render(source).unwrap(), "8|B|True|role=user;content=Hi;");
}

#[test]
fn values_print_as_in_python() {
    assert_eq!(
        render("{{ true }} {{ none }} {{ 1.0 }} {{ [1, 'a', none] }} {{ {'a': true} }}").unwrap(),
        "True None 1.0 [1, 'a', None] {'a': True}"
    );
}

#[test]
fn tojson_is_pythons() {
    let template =
        "{{ tools | tojson }}\n{{ tools | tojson(indent=2) }}\n{{ tools[0] | tojson(separators=(',', ':')) }}";
    let tools = json!([{"z": 1, "a": {"b": [1.0, null, true], "e": {}, "é": "<&'>"}}]);
    let rendered =
        ChatTemplate::new(template, &tokens()).unwrap().render(&[], Some(&tools), false, &Map::new()).unwrap();
    let want = r#"[{"z": 1, "a": {"b": [1.0, null, true], "e": {}, "é": "<&'>"}}]
[
  {
    "z": 1,
    "a": {
      "b": [
        1.0,
        null,
        true
      ],
      "e": {},
      "é": "<&'>"
    }
  }
]
{"z":1,"a":{"b":[1.0,null,true],"e":{},"é":"<&'>"}}"#;
    assert_eq!(rendered, want);
}

#[test]
fn extra_variables_reach_the_template_but_replace_none() {
    let extra = json!({"enable_thinking": false, "messages": [], "custom": 7});
    let template =
        ChatTemplate::new("{{ messages|length }} {{ enable_thinking }} {{ custom }} {{ tools is none }}", &tokens());
    let rendered = template.unwrap().render(&[json!({})], None, false, extra.as_object().unwrap());
    assert_eq!(rendered.unwrap(), "1 False 7 True");
}

#[test]
fn clock_is_an_argument() {
    let noon = || jiff::civil::date(2024, 7, 26).at(12, 0, 0, 0).to_zoned_datetime(jiff::tz::TimeZone::UTC).unwrap();
    let template = ChatTemplate::with_clock("{{ strftime_now('%d %b %Y') }}", &tokens(), noon).unwrap();
    assert_eq!(template.render(&[], None, false, &Map::new()).unwrap(), "26 Jul 2024");
}

#[test]
fn generation_marks_are_tolerated() {
    let marked = "{% for m in messages %}{%- generation -%}\n {{ m.content }}\n{%- endgeneration %}{% endfor %}";
    assert_eq!(render(marked).unwrap(), "HiYo");
}

#[test]
fn refusals_keep_the_templates_words() {
    let error = render("{{ raise_exception('Roles must alternate') }}").unwrap_err();
    assert!(matches!(&error, TemplateError::Refused { message } if message == "Roles must alternate"), "{error:?}");
    assert!(error.is_about_messages());
    let nested = "{% macro m() %}{{ raise_exception('deep') }}{% endmacro %}{{ m() }}";
    assert!(matches!(render(nested).unwrap_err(), TemplateError::Refused { message } if message == "deep"));
}

#[test]
fn broken_templates_say_where() {
    let error = render("a\n{% if %}").unwrap_err();
    assert!(matches!(&error, TemplateError::Syntax { reason } if reason.contains("line 2")), "{error}");
    let error = render("a\n{{ nosuch() }}").unwrap_err();
    assert!(matches!(&error, TemplateError::Render { reason } if reason.contains("line 2")), "{error}");
}

#[test]
fn greedy_templates_are_stopped() {
    let doubled = "{% set ns = namespace(s='xxxxxxxx') %}{% for i in range(99) %}{% set ns.s = ns.s + ns.s %}{% endfor %}{{ ns.s }}";
    let endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}";
    let wide = "{% for a in range(99999) %}{{ 'x' * 100000 }}{% endfor %}";
    let indented = "{% set l = range(90000)|list %}{% for a in range(9999) %}{{ l | tojson(indent=32) }}{% endfor %}";
    for source in [doubled, endless, wide, indented] {
        assert!(matches!(render(source).unwrap_err(), TemplateError::Exhausted), "{source}");
    }
    let recursive = "{% macro m(n) %}{{ m(n + 1) }}{% endmacro %}{{ m(0) }}";
    assert!(render(recursive).is_err());
    assert!(matches!(render(&" ".repeat(LONGEST_TEMPLATE_BYTES + 1)).unwrap_err(), TemplateError::Syntax { .. }));
}

#[test]
fn nested_values_do_not_fill_the_stack() {
    let nest = "{% set ns = namespace(l=[]) %}{% for i in range(50000) %}{% set ns.l = [ns.l] %}{% endfor %}";
    assert_eq!(render(nest).unwrap(), "");
    assert!(render(&format!("{nest}{{{{ ns.l | tojson }}}}")).is_err());
    let all_the_fuel = "{% set ns = namespace(l=[]) %}{% for i in range(99999) %}{% for j in range(99999) %}{% set ns.l = [ns.l] %}{% endfor %}{% endfor %}";
    for source in [all_the_fuel.to_owned(), all_the_fuel.replace("[ns.l]", "{'a': ns.l}")] {
        assert!(matches!(render(&source).unwrap_err(), TemplateError::Exhausted));
    }
    // Whatever these give, they come back.
    for all_levels in ["{{ ns.l }}", "{{ ns.l == [ns.l] }}", "{{ ns.l | string | length }}"] {
        drop(render(&format!("{nest}{all_levels}")));
    }
}

#[test]
fn long_conversations_are_not_exhausting() {
    let source = "{% for message in messages %}{% if message.role == 'user' %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] | trim + '<|im_end|>' }}{% else %}{{ message.content }}{% endif %}{% endfor %}";
    let messages = vec![json!({"role": "user", "content": "word ".repeat(200)}); 1000];
    let rendered = ChatTemplate::new(source, &tokens()).unwrap().render(&messages, None, true, &Map::new()).unwrap();
    assert_eq!(rendered.len(), 1000 * (999 + "<|im_start|>user\n<|im_end|>".len()));
}

#[test]
fn folders_offer_a_template_in_several_ways() {
    let folder = tempfile::tempdir().unwrap();
    let load = || ChatTemplate::from_folder(folder.path(), &tokens());
    assert!(matches!(load().unwrap_err(), TemplateError::Missing));
    assert!(load().unwrap_err().to_string().contains("--chat-template"));
    let config = folder.path().join("tokenizer_config.json");
    std::fs::write(&config, json!({"chat_template": "one"}).to_string()).unwrap();
    assert_eq!(load().unwrap().source(), "one");
    let named = json!([{"name": "rag", "template": "r"}, {"name": "default", "template": "two"}]);
    std::fs::write(&config, json!({"chat_template": named}).to_string()).unwrap();
    assert_eq!(load().unwrap().source(), "two");
    let none = json!([{"name": "rag", "template": "r"}, {"name": "tool", "template": "t"}]);
    std::fs::write(&config, json!({"chat_template": none}).to_string()).unwrap();
    assert!(matches!(load().unwrap_err(), TemplateError::NoDefault { names } if names == "rag, tool"));
    std::fs::write(folder.path().join("chat_template.jinja"), "three").unwrap();
    assert_eq!(load().unwrap().source(), "three");
}
