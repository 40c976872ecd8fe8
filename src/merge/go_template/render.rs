//! Tree to text.

use serde_json::Value;

use super::{Expression, Function, GoTemplateError, Node};
use crate::text::python_json;

/// Renders nodes over the data.
pub(super) fn render(nodes: &[Node], data: &Value) -> Result<String, GoTemplateError> {
    let mut state = State {
        variables: vec![("$".to_owned(), data.clone())],
        out: String::new(),
    };
    state.nodes(nodes, data)?;
    Ok(state.out)
}

struct State {
    /// Names with their `$`, the innermost last.
    variables: Vec<(String, Value)>,
    out: String,
}

impl State {
    fn nodes(&mut self, nodes: &[Node], dot: &Value) -> Result<(), GoTemplateError> {
        let num_outer = self.variables.len();
        for node in nodes {
            self.node(node, dot)?;
        }
        self.variables.truncate(num_outer);
        Ok(())
    }

    fn node(&mut self, node: &Node, dot: &Value) -> Result<(), GoTemplateError> {
        match node {
            Node::Text(text) => self.out.push_str(text),
            Node::Print(value) => {
                let value = self.value(value, dot)?;
                self.out.push_str(&printed(&value)?);
            }
            Node::Assign {
                name,
                declares,
                value,
            } => {
                let value = self.value(value, dot)?;
                if *declares {
                    self.variables.push((name.clone(), value));
                } else {
                    *self.variable(name)? = value;
                }
            }
            Node::If(branches) => {
                for (condition, nodes) in branches {
                    let holds = match condition {
                        Some(condition) => is_true(&self.value(condition, dot)?),
                        None => true,
                    };
                    if holds {
                        return self.nodes(nodes, dot);
                    }
                }
            }
            Node::Range {
                index,
                item,
                list,
                body,
            } => {
                let list = self.value(list, dot)?;
                for (place, value) in list.as_array().into_iter().flatten().enumerate() {
                    let num_outer = self.variables.len();
                    if let Some(name) = index {
                        self.variables.push((name.clone(), Value::from(place)));
                    }
                    if let Some(name) = item {
                        self.variables.push((name.clone(), value.clone()));
                    }
                    self.nodes(body, value)?;
                    self.variables.truncate(num_outer);
                }
            }
        }
        Ok(())
    }

    fn variable(&mut self, name: &str) -> Result<&mut Value, GoTemplateError> {
        let found = self
            .variables
            .iter_mut()
            .rev()
            .find(|(known, _)| known == name);
        found
            .map(|(_, value)| value)
            .ok_or_else(|| GoTemplateError::Render {
                message: format!("undefined variable {name}"),
            })
    }

    fn value(&mut self, expression: &Expression, dot: &Value) -> Result<Value, GoTemplateError> {
        match expression {
            Expression::Literal(value) => Ok(value.clone()),
            Expression::Field { variable, path } => {
                let mut value = match variable {
                    Some(name) => &*self.variable(name)?,
                    None => dot,
                };
                for name in path {
                    value = &value[name];
                }
                Ok(value.clone())
            }
            Expression::Call {
                function,
                arguments,
            } => self.call(*function, arguments, dot),
        }
    }

    fn call(
        &mut self,
        function: Function,
        arguments: &[Expression],
        dot: &Value,
    ) -> Result<Value, GoTemplateError> {
        let mut values = Vec::with_capacity(arguments.len());
        for argument in arguments {
            let value = self.value(argument, dot)?;
            // As in Go, `and` and `or` return the value that decides.
            match (function, is_true(&value)) {
                (Function::And, false) | (Function::Or, true) => return Ok(value),
                _ => values.push(value),
            }
        }
        let first = values.first().unwrap_or(&Value::Null);
        let second = values.get(1).unwrap_or(&Value::Null);
        Ok(match function {
            Function::And | Function::Or => values.pop().unwrap_or(Value::Null),
            Function::Not => Value::from(!is_true(first)),
            Function::Eq => Value::from(equals(first, second)?),
            Function::Ne => Value::from(!equals(first, second)?),
            Function::Gt => Value::from(integer(first)? > integer(second)?),
            Function::Lt => Value::from(integer(first)? < integer(second)?),
            Function::Len => Value::from(match first {
                Value::String(text) => text.len(),
                Value::Array(list) => list.len(),
                Value::Object(map) => map.len(),
                _ => 0,
            }),
            // A date would make renderings differ from day to day; all are rendered with this one.
            Function::CurrentDate => Value::from("1970-01-01"),
        })
    }
}

/// Compares as Go does, which refuses to compare different kinds.
fn equals(left: &Value, right: &Value) -> Result<bool, GoTemplateError> {
    let same_kind = std::mem::discriminant(left) == std::mem::discriminant(right);
    if !same_kind && !left.is_null() && !right.is_null() {
        return Err(GoTemplateError::Render {
            message: format!("{left} and {right} cannot be compared"),
        });
    }
    Ok(left == right)
}

fn integer(value: &Value) -> Result<i64, GoTemplateError> {
    value.as_i64().ok_or_else(|| GoTemplateError::Render {
        message: format!("{value} is not a whole number"),
    })
}

/// Go's truth: not the zero value of its kind.
fn is_true(value: &Value) -> bool {
    match value {
        Value::Null => false,
        Value::Bool(value) => *value,
        Value::Number(number) => number.as_f64() != Some(0.0),
        Value::String(text) => !text.is_empty(),
        Value::Array(list) => !list.is_empty(),
        Value::Object(map) => !map.is_empty(),
    }
}

fn printed(value: &Value) -> Result<String, GoTemplateError> {
    Ok(match value {
        Value::Null => String::new(),
        Value::String(text) => text.clone(),
        value => python_json(value)?,
    })
}
