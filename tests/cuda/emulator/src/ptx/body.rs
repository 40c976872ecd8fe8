//! Reads the body of an entry point into a program.

use std::collections::HashMap;
use std::sync::Arc;

use super::allocate::allocate;
use super::builder::{Builder, Statement, Width};
use super::decode::decode;
use super::lexer::Token;
use super::operand::{Operand, Space, parse_number};
use super::parser::{Cursor, Variable, parse_variable};
use super::program::{Inst, Kind, Program, Slot};
use super::variables::Globals;

/// Registers that a `.reg` declares: one by name or `name0`, `name1`, …
#[derive(Debug)]
struct Declaration<'a> {
    name: &'a str,
    first: u32,
    /// `None` for one register.
    count: Option<u32>,
}

/// What is known within a body.
struct Scope<'a, 'm> {
    builder: Builder,
    declarations: Vec<Declaration<'a>>,
    symbols: HashMap<&'a str, (Space, u64)>,
    globals: &'m Globals,
    labels: HashMap<&'a str, usize>,
    /// Branches, their labels and lines.
    branches: Vec<(usize, &'a str, u32)>,
    local_bytes: usize,
}

/// Returns the program and its static shared memory.
///
/// # Errors
/// What is not known, with its line.
pub(super) fn parse_body<'a>(
    tokens: &[Token<'a>],
    params: HashMap<&'a str, (Space, u64)>,
    shared: &HashMap<&str, Variable<'a>>,
    globals: &Globals,
    source: &Arc<str>,
) -> Result<(Program, u32), String> {
    let mut scope = Scope {
        builder: Builder::default(),
        declarations: Vec::new(),
        symbols: params,
        globals,
        labels: HashMap::new(),
        branches: Vec::new(),
        local_bytes: 0,
    };
    let (static_bytes, dynamic_start) = scope.place_shared(tokens, shared)?;
    let mut cursor = Cursor::new(tokens);
    // Where the declarations of each inline scope begin.
    let mut scopes = Vec::new();
    while !cursor.peek().is_empty() {
        match cursor.peek() {
            ";" => cursor.at += 1,
            "{" => {
                scopes.push(scope.declarations.len());
                cursor.at += 1;
            }
            "}" => {
                let start = scopes
                    .pop()
                    .ok_or_else(|| format!("line {}: `}}` without `{{`", cursor.line()))?;
                scope.declarations.truncate(start);
                cursor.at += 1;
            }
            ".reg" => scope.declare_registers(&mut cursor)?,
            ".local" => scope.declare_local(&mut cursor)?,
            ".shared" | ".pragma" | ".loc" => skip_directive(&mut cursor),
            label if cursor.peek_second() == ":" => {
                if scope
                    .labels
                    .insert(label, scope.builder.code.len())
                    .is_some()
                {
                    return Err(format!(
                        "line {}: label {label} is defined twice",
                        cursor.line()
                    ));
                }
                cursor.at += 2;
            }
            _ => scope.statement(&mut cursor)?,
        }
    }
    scope.finish(static_bytes, dynamic_start, source)
}

/// Goes past `;`, or past the line of a `.loc`.
fn skip_directive(cursor: &mut Cursor<'_, '_>) {
    if cursor.peek() == ".loc" {
        let line = cursor.line();
        while cursor.line() == line && !cursor.peek().is_empty() {
            cursor.at += 1;
        }
        return;
    }
    while !matches!(cursor.next(), ";" | "") {}
}

impl<'a> Scope<'a, '_> {
    /// Gives all shared variables of the body, declared there or used, their places; returns the bytes of the
    /// static ones and where the dynamic ones begin.
    fn place_shared(
        &mut self,
        tokens: &[Token<'a>],
        shared: &HashMap<&str, Variable<'a>>,
    ) -> Result<(u32, u32), String> {
        let mut end = 0;
        let mut dynamic = Vec::new();
        let mut dynamic_align = 16;
        let mut cursor = Cursor::new(tokens);
        while !cursor.peek().is_empty() {
            let token = cursor.next();
            let variable = if token == ".shared" {
                parse_variable(&mut cursor)?
            } else if let Some(variable) = shared
                .get(token)
                .filter(|_| !self.symbols.contains_key(token))
            {
                variable.clone()
            } else {
                continue;
            };
            let Some(num_bytes) = variable.num_bytes else {
                dynamic_align = dynamic_align.max(variable.align);
                dynamic.push(variable.name);
                continue;
            };
            let start = usize::next_multiple_of(end, variable.align);
            end = start + num_bytes;
            self.symbols
                .insert(variable.name, (Space::Shared, start as u64));
        }
        let dynamic_start = end.next_multiple_of(dynamic_align);
        for name in dynamic {
            self.symbols
                .insert(name, (Space::Shared, dynamic_start as u64));
        }
        Ok((end as u32, dynamic_start as u32))
    }

    /// Reads `.reg .b32 %r<5>, a;`.
    fn declare_registers(&mut self, cursor: &mut Cursor<'a, '_>) -> Result<(), String> {
        cursor.expect(".reg")?;
        let line = cursor.line();
        let width = match cursor.next() {
            ".pred" => Width::Predicate,
            ".b8" | ".u8" | ".s8" => Width::Narrow(8),
            ".b16" | ".u16" | ".s16" | ".f16" | ".bf16" => Width::Narrow(16),
            ".b32" | ".u32" | ".s32" | ".f32" | ".f16x2" | ".bf16x2" => Width::Narrow(32),
            ".b64" | ".u64" | ".s64" | ".f64" => Width::Wide,
            other => {
                return Err(format!(
                    "line {line}: registers of type `{other}` are not known"
                ));
            }
        };
        loop {
            let name = cursor.next();
            let first = self.builder.registers.len() as u32;
            let mut count = None;
            if cursor.take("<") {
                count = Some(cursor.number()? as u32);
                cursor.expect(">")?;
            }
            self.declarations.push(Declaration { name, first, count });
            let length = self.builder.registers.len() + count.unwrap_or(1) as usize;
            self.builder.registers.resize(length, width);
            if !cursor.take(",") {
                return cursor.expect(";");
            }
        }
    }

    /// Reads a variable in local memory.
    fn declare_local(&mut self, cursor: &mut Cursor<'a, '_>) -> Result<(), String> {
        cursor.expect(".local")?;
        let variable = parse_variable(cursor)?;
        let start = self.local_bytes.next_multiple_of(variable.align);
        self.local_bytes = start + variable.num_bytes.unwrap_or(0);
        self.symbols
            .insert(variable.name, (Space::Local, start as u64));
        cursor.expect(";")
    }

    /// Returns the register of a name.
    fn register(&self, name: &str) -> Option<u32> {
        let stem = name.trim_end_matches(|character: char| character.is_ascii_digit());
        let index: Option<u32> = name[stem.len()..].parse().ok();
        self.declarations
            .iter()
            .rev()
            .find_map(|declaration| match (declaration.count, index) {
                (None, _) if declaration.name == name => Some(declaration.first),
                (Some(count), Some(index)) if declaration.name == stem && index < count => {
                    Some(declaration.first + index)
                }
                _ => None,
            })
    }

    /// Reads a statement and decodes it.
    fn statement(&mut self, cursor: &mut Cursor<'a, '_>) -> Result<(), String> {
        let line = cursor.line();
        let start = cursor.at;
        let result = self.read_statement(cursor);
        result.map_err(|error| {
            let mut text = String::new();
            let mut words = cursor.clone();
            words.at = start;
            while !matches!(words.peek(), ";" | "") && text.len() < 200 {
                text.push_str(words.next());
                text.push(' ');
            }
            format!("line {line}: {error}: {text}")
        })
    }

    /// The same without the line in errors.
    fn read_statement(&mut self, cursor: &mut Cursor<'a, '_>) -> Result<(), String> {
        let line = cursor.line();
        let mut guard = Slot::TRUE.0 << 1;
        let accesses = self.builder.accesses.len();
        if cursor.take("@") {
            let is_negated = cursor.take("!");
            let operand = self.operand(cursor)?;
            guard = self.builder.predicate(&operand)?.0 << 1 | u32::from(is_negated);
        }
        let opcode = cursor.next();
        let mut operands = Vec::new();
        while !cursor.take(";") {
            operands.push(self.operand(cursor)?);
            if !cursor.take(",") && cursor.peek() != ";" {
                return Err(format!("wanted `,` or `;`, found `{}`", cursor.peek()));
            }
        }
        let mut parts: [&str; 16] = [""; 16];
        let mut num_parts = 0;
        for part in opcode.split('.') {
            *parts.get_mut(num_parts).ok_or("too many modifiers")? = part;
            num_parts += 1;
        }
        let statement = Statement {
            opcode,
            parts: &parts[..num_parts],
            operands: &operands,
            line,
        };
        if parts[0] == "bra" {
            return self.branch(&statement, guard);
        }
        let mut inst = decode(&mut self.builder, &statement)?;
        inst.guard = guard;
        inst.line = line;
        self.push(inst, accesses);
        Ok(())
    }

    /// Adds an instruction.
    fn push(&mut self, inst: Inst, accesses: usize) {
        debug_assert!(
            accesses <= self.builder.accesses.len(),
            "accesses are only added"
        );
        self.builder.code.push(inst);
        self.builder.access_ends.push(self.builder.accesses.len());
    }

    /// Adds a branch, whose target is set at the end.
    fn branch(&mut self, statement: &Statement<'a, '_>, guard: u32) -> Result<(), String> {
        let [Operand::Label(label)] = *statement.operands else {
            return Err("wanted a label".to_owned());
        };
        let mut inst = self.builder.no_operation();
        inst.kind = Kind::Branch;
        inst.guard = guard;
        inst.line = statement.line;
        self.branches
            .push((self.builder.code.len(), label, statement.line));
        self.push(inst, self.builder.accesses.len());
        Ok(())
    }

    /// Reads an operand.
    fn operand(&self, cursor: &mut Cursor<'a, '_>) -> Result<Operand<'a>, String> {
        let first = match cursor.peek() {
            "[" => return self.address(cursor),
            "{" => {
                cursor.at += 1;
                return Ok(Operand::Vector(self.operands_until(cursor, "}")?));
            }
            "!" => {
                cursor.at += 1;
                return match self.operand(cursor)? {
                    Operand::Register(register) => Ok(Operand::Not(register)),
                    other => Err(format!("wanted a predicate after `!`, found {other:?}")),
                };
            }
            "-" => return Ok(Operand::Immediate(cursor.number()?)),
            _ => self.name(cursor.next())?,
        };
        if cursor.take("|") {
            let second = self.operand(cursor)?;
            return Ok(Operand::Pair(Box::new(first), Box::new(second)));
        }
        match first {
            Operand::Symbol { space, address } if cursor.take("+") => Ok(Operand::Symbol {
                space,
                address: address.wrapping_add(cursor.number()?),
            }),
            _ => Ok(first),
        }
    }

    /// Reads operands up to and including `end`.
    fn operands_until(
        &self,
        cursor: &mut Cursor<'a, '_>,
        end: &str,
    ) -> Result<Vec<Operand<'a>>, String> {
        let mut operands = Vec::new();
        while !cursor.take(end) {
            operands.push(self.operand(cursor)?);
            if !cursor.take(",") && cursor.peek() != end {
                return Err(format!("wanted `,` or `{end}`, found `{}`", cursor.peek()));
            }
        }
        Ok(operands)
    }

    /// Reads `[base+offset]` or `[base, {coordinates}]`.
    fn address(&self, cursor: &mut Cursor<'a, '_>) -> Result<Operand<'a>, String> {
        cursor.expect("[")?;
        let base = Box::new(self.operand(cursor)?);
        let offset = if cursor.take("+") || cursor.peek() == "-" {
            cursor.number()? as i64
        } else {
            0
        };
        let mut coordinates = Vec::new();
        if cursor.take(",") {
            match self.operand(cursor)? {
                Operand::Vector(operands) => coordinates = operands,
                other => return Err(format!("wanted coordinates, found {other:?}")),
            }
        }
        if !cursor.take("]") {
            return Err(format!("wanted `]`, found `{}`", cursor.peek()));
        }
        Ok(Operand::Address {
            base,
            offset,
            coordinates,
        })
    }

    /// Returns what a name or number stands for.
    fn name(&self, text: &'a str) -> Result<Operand<'a>, String> {
        if text == "_" {
            return Ok(Operand::Sink);
        }
        if text.starts_with(|character: char| character.is_ascii_digit()) {
            let value = parse_number(text).ok_or_else(|| format!("`{text}` is no number"))?;
            return Ok(Operand::Immediate(value));
        }
        if let Some(register) = self.register(text) {
            return Ok(Operand::Register(register));
        }
        if let Some(&(space, address)) = self.symbols.get(text) {
            return Ok(Operand::Symbol { space, address });
        }
        if let Some(address) = self.globals.address(text) {
            return Ok(Operand::Symbol {
                space: Space::Global,
                address,
            });
        }
        match text.as_bytes().first() {
            Some(b'%') => Ok(Operand::Special(text)),
            Some(b'a'..=b'z' | b'A'..=b'Z' | b'_' | b'$') => Ok(Operand::Label(text)),
            _ => Err(format!("wanted an operand, found `{text}`")),
        }
    }

    /// Resolves labels and registers.
    fn finish(
        mut self,
        static_bytes: u32,
        dynamic_start: u32,
        source: &Arc<str>,
    ) -> Result<(Program, u32), String> {
        // Lanes that run past the last statement end as if it were `ret`.
        let mut end = self.builder.no_operation();
        end.kind = Kind::Exit;
        self.push(end, self.builder.accesses.len());
        for (index, label, line) in self.branches {
            let target = self
                .labels
                .get(label)
                .ok_or_else(|| format!("line {line}: label {label} is not defined"))?;
            self.builder.code[index].imm = *target as i64;
        }
        let (num_rows, num_predicates) = allocate(&mut self.builder);
        let Builder {
            code,
            lists,
            constants,
            ..
        } = self.builder;
        let program = Program {
            code,
            lists,
            constants,
            num_rows,
            num_predicates,
            local_bytes: self.local_bytes.next_multiple_of(16),
            dynamic_shared_start: dynamic_start,
            globals: self.globals.clone(),
            source: Arc::clone(source),
        };
        Ok((program, static_bytes))
    }
}
