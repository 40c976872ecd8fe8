//! Operands of instructions: registers, numbers, variables, addresses, vectors.

/// An operand.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Operand<'a> {
    /// A register by its number.
    Register(u32),
    /// The predicate register that must not be set.
    Not(u32),
    /// Bits of a number; integers are extended with their sign.
    Immediate(u64),
    /// A variable's or parameter's address in its space.
    Symbol {
        /// Which space.
        space: Space,
        /// Its address there.
        address: u64,
    },
    /// A place of the code.
    Label(&'a str),
    /// What the hardware knows, `%tid.x` for example.
    Special(&'a str),
    /// A place in memory.
    Address {
        /// Register, number or variable.
        base: Box<Operand<'a>>,
        /// Bytes from there.
        offset: i64,
        /// Coordinates in a tensor.
        coordinates: Vec<Operand<'a>>,
    },
    /// Operands in braces.
    Vector(Vec<Operand<'a>>),
    /// A register and the predicate after `|`.
    Pair(Box<Operand<'a>>, Box<Operand<'a>>),
    /// `_`: not wanted.
    Sink,
}

/// Where variables are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Space {
    /// The GPU's memory.
    Global,
    /// A block's memory.
    Shared,
    /// A thread's memory.
    Local,
    /// A kernel's parameters.
    Param,
}

/// Reads a number: decimal, hexadecimal, octal, binary, `0f` and `0d` with the bits of floats.
pub(super) fn parse_number(text: &str) -> Option<u64> {
    let digits = text.strip_suffix('U').unwrap_or(text);
    let prefix = digits.get(..2).unwrap_or("");
    match prefix {
        "0x" | "0X" => u64::from_str_radix(&digits[2..], 16).ok(),
        "0b" | "0B" => u64::from_str_radix(&digits[2..], 2).ok(),
        "0f" | "0F" if digits.len() == 10 => u64::from_str_radix(&digits[2..], 16).ok(),
        "0d" | "0D" if digits.len() == 18 => u64::from_str_radix(&digits[2..], 16).ok(),
        _ if digits.len() > 1 && digits.starts_with('0') => {
            u64::from_str_radix(&digits[1..], 8).ok()
        }
        _ if digits.contains('.') => text.parse::<f64>().ok().map(f64::to_bits),
        _ => digits.parse().ok(),
    }
}

#[cfg(test)]
mod tests {
    use super::parse_number;

    #[test]
    fn numbers_of_all_forms_are_read() {
        assert_eq!(parse_number("0"), Some(0));
        assert_eq!(parse_number("18446744073709551615"), Some(u64::MAX));
        assert_eq!(parse_number("0x1FU"), Some(31));
        assert_eq!(parse_number("017"), Some(15));
        assert_eq!(parse_number("0b101"), Some(5));
        assert_eq!(parse_number("0f3F800000"), Some(u64::from(1_f32.to_bits())));
        assert_eq!(parse_number("0d3FF0000000000000"), Some(1_f64.to_bits()));
        assert_eq!(parse_number("%r1"), None);
    }
}
