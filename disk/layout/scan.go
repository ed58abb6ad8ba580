package layout

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"math/bits"
	"unicode/utf8"
)

// Members calls f with every member of a JSON object, in order. raw must be valid JSON. If it is not an object, Members
// returns false and doesn't call f. To find one name among ten thousand, this takes a tenth of the time of decoding
// them.
func Members(raw []byte, f func(key string, value json.RawMessage)) bool {
	s := scanner{b: raw}
	if !s.enter('{') {
		return false
	}
	for s.more('}') {
		key := s.key()
		if value := s.value(); !s.bad {
			f(unquote(key), value)
		}
	}
	return true
}

// Elements calls f with every element of a JSON array. raw must be valid JSON. If it is not an array, Elements returns
// false and doesn't call f.
func Elements(raw []byte, f func(value json.RawMessage)) bool {
	s := scanner{b: raw}
	if !s.enter('[') {
		return false
	}
	for s.more(']') {
		if value := s.value(); !s.bad {
			f(value)
		}
	}
	return true
}

// EditMembers returns a JSON object in which each member has the value that f returns for it; a member for which f
// returns nil is removed. All other bytes stay the same, but if no member is left, the white space between them goes
// too. raw must be valid JSON; if it is not an object it is returned unchanged.
func EditMembers(raw []byte, f func(key string, value json.RawMessage) []byte) []byte {
	return edit(raw, '{', '}', f)
}

// EditElements is [EditMembers] for the elements of an array.
func EditElements(raw []byte, f func(value json.RawMessage) []byte) []byte {
	return edit(raw, '[', ']', func(_ string, value json.RawMessage) []byte { return f(value) })
}

func edit(raw []byte, opening, closing byte, f func(key string, value json.RawMessage) []byte) []byte {
	s := scanner{b: raw}
	if !s.enter(opening) {
		return raw
	}
	edited := raw[:s.i:s.i]
	copied, index, kept := s.i, 0, 0
	for ; s.more(closing); index++ {
		key := ""
		if opening == '{' {
			if quoted := s.key(); !s.bad {
				key = unquote(quoted)
			}
		}
		value := s.value()
		if s.bad {
			break
		}
		before := raw[copied : s.i-len(value)]
		copied = s.i
		value = f(key, value)
		if value == nil {
			continue
		}
		if kept++; kept == 1 && index > 0 {
			_, before, _ = bytes.Cut(before, []byte{','}) // drop the comma after the members that were removed
		}
		edited = append(append(edited, before...), value...)
	}
	rest := raw[copied:]
	if kept == 0 && index > 0 {
		rest = bytes.TrimLeft(rest, " \t\r\n")
	}
	return append(edited, rest...)
}

// unquote decodes a valid JSON string as encoding/json does.
func unquote(quoted []byte) string {
	text := quoted[1 : len(quoted)-1]
	if bytes.IndexByte(text, '\\') < 0 && utf8.Valid(text) {
		return string(text)
	}
	var s string
	_ = json.Unmarshal(quoted, &s)
	return s
}

// maxNesting bounds how deep values may nest. encoding/json has the same bound.
const maxNesting = 10000

// scanner reads JSON once and validates it on the way. Results point into b; nothing is copied. After the first invalid
// byte bad is set, and key and value return nil.
type scanner struct {
	b      []byte
	i      int
	depth  int
	opened bool // the last thing that was read is an opening bracket
	bad    bool
}

// peek skips white space and returns the next byte without consuming it, or 0 at the end.
func (s *scanner) peek() byte {
	if s.i < len(s.b) && s.b[s.i] > ' ' {
		return s.b[s.i]
	}
	return s.skipSpace()
}

func (s *scanner) skipSpace() byte {
	for ; s.i < len(s.b); s.i++ {
		switch c := s.b[s.i]; c {
		case ' ', '\t', '\r', '\n':
		default:
			return c
		}
	}
	return 0
}

// take skips white space. It consumes the next byte and returns true if that is c.
func (s *scanner) take(c byte) bool {
	if s.bad || s.peek() != c {
		return false
	}
	s.i++
	return true
}

// end reports whether all is valid and nothing but white space is left.
func (s *scanner) end() bool { return !s.bad && s.peek() == 0 && s.i == len(s.b) }

// enter consumes the opening bracket of an object ('{') or array ('['). If the next value is something else, it
// consumes nothing and returns false.
func (s *scanner) enter(bracket byte) bool {
	if !s.take(bracket) {
		return false
	}
	s.depth++
	s.opened, s.bad = true, s.depth > maxNesting
	return true
}

// more advances to the next member or element of the innermost object or array. At its end it consumes the closing
// bracket, and returns false.
func (s *scanner) more(bracket byte) bool {
	first := s.opened
	s.opened = false
	if s.take(bracket) {
		s.depth--
		return false
	}
	if !first && !s.take(',') {
		s.bad = true
	}
	return !s.bad
}

// key consumes a member's key and the colon after it, and returns the key with its quotes.
func (s *scanner) key() []byte {
	if s.peek() != '"' {
		s.bad = true
		return nil
	}
	start := s.i
	s.skipText()
	end := s.i
	if !s.take(':') {
		s.bad = true
	}
	return s.b[start:end]
}

// value consumes and returns the next value.
func (s *scanner) value() []byte {
	c := s.peek()
	start := s.i
	switch {
	case s.bad:
	case c == '"':
		s.skipText()
	case c == '{':
		s.enter('{')
		for s.more('}') {
			s.key()
			s.value()
		}
	case c == '[':
		s.enter('[')
		for s.more(']') {
			s.value()
		}
	case c == '-' || isDigit(c):
		s.skipNumber()
	default:
		s.bad = true
		for _, word := range []string{"true", "false", "null"} {
			if bytes.HasPrefix(s.b[s.i:], []byte(word)) {
				s.i += len(word)
				s.bad = false
			}
		}
	}
	if s.bad {
		return nil
	}
	return s.b[start:s.i]
}

func isDigit(c byte) bool { return '0' <= c && c <= '9' }

// skipText consumes a string.
func (s *scanner) skipText() {
	b, i := s.b, s.i+1
	for {
		i = plain(b, i)
		if i < len(b) && b[i] == '"' {
			s.i = i + 1
			return
		}
		if i == len(b) || b[i] < ' ' {
			s.bad = true
			return
		}
		i += 2
		if i > len(b) {
			s.bad = true
			return
		}
		switch b[i-1] {
		case '"', '\\', '/', 'b', 'f', 'n', 'r', 't':
		case 'u':
			for end := i + 4; i < end; i++ {
				if i == len(b) || !isDigit(b[i]) && (b[i]|' ' < 'a' || b[i]|' ' > 'f') {
					s.bad = true
					return
				}
			}
		default:
			s.bad = true
			return
		}
	}
}

// plain returns the position, from i on, of the first byte that is special in a string: a quote, a backslash or a
// control character. It tests sixteen bytes at a time, since an index.json is mostly strings.
func plain(b []byte, i int) int {
	for ; i+16 <= len(b); i += 16 {
		p := b[i : i+16 : i+16]
		first, second := special(binary.LittleEndian.Uint64(p)), special(binary.LittleEndian.Uint64(p[8:]))
		if first != 0 {
			return i + bits.TrailingZeros64(first)/8
		}
		if second != 0 {
			return i + 8 + bits.TrailingZeros64(second)/8
		}
	}
	for ; i < len(b); i++ {
		if b[i] == '"' || b[i] == '\\' || b[i] < ' ' {
			return i
		}
	}
	return i
}

// special looks for quotes, backslashes and control characters in eight bytes. The lowest bit that it sets is the high
// bit of the first such byte; higher bits are unreliable.
func special(w uint64) uint64 {
	const ones, highs = 0x0101010101010101, 0x8080808080808080
	// The lowest high bit set in (w - ones*n) &^ w is that of the first byte less than n, for n up to 128.
	quote, escape := w^ones*'"', w^ones*'\\'
	return ((w-ones*' ')&^w | (quote-ones)&^quote | (escape-ones)&^escape) & highs
}

// skipNumber consumes a number. JSON allows no leading zeros, and needs digits on both sides of a point.
func (s *scanner) skipNumber() {
	if s.b[s.i] == '-' {
		s.i++
	}
	if s.i < len(s.b) && s.b[s.i] == '0' {
		s.i++
	} else {
		s.skipDigits()
	}
	if s.i < len(s.b) && s.b[s.i] == '.' {
		s.i++
		s.skipDigits()
	}
	if s.i < len(s.b) && s.b[s.i]|' ' == 'e' {
		s.i++
		if s.i < len(s.b) && (s.b[s.i] == '+' || s.b[s.i] == '-') {
			s.i++
		}
		s.skipDigits()
	}
}

func (s *scanner) skipDigits() {
	from := s.i
	for s.i < len(s.b) && isDigit(s.b[s.i]) {
		s.i++
	}
	s.bad = s.bad || s.i == from
}
