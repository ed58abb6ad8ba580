package layout

import (
	"bytes"
	"encoding/json"
	"reflect"
	"strings"
	"testing"
)

func valid(b []byte) bool {
	s := scanner{b: b}
	s.value()
	return s.end()
}

func TestScanOfNestedValues(t *testing.T) {
	for _, text := range []string{
		strings.Repeat("[", 10001) + strings.Repeat("]", 10001), strings.Repeat("[", 1<<20),
		strings.Repeat(`{"":`, 10000) + "1" + strings.Repeat("}", 10000), strings.Repeat("[", 9999) + "{}" + strings.Repeat("]", 9999),
	} {
		if ok := valid([]byte(text)); ok != json.Valid([]byte(text)) {
			t.Errorf("%.20s…, %d bytes: valid %t", text, len(text), ok)
		}
	}
}

// The scan finds the same values as encoding/json.
func FuzzScan(f *testing.F) {
	for _, text := range []string{
		`{}`, `[]`, ` { } `, `null`, `1`, `"{"`, `{"a":1,"b":[1,2,{"c":"]}"}],"a":null}`, `[ 1 , -2.5e3 , true,"\"", {} , [ [ ] ] ]`,
		`{"\u0061\"":"\\","":{}}`, `{"a" : "b:c,d" }`, "\t[\n\"é\" ]", `[[],[[]],{"":[]}]`,
	} {
		f.Add([]byte(text))
	}
	for _, text := range []string{
		``, ` `, `{`, `[`, `]`, `}`, `{]`, `[}`, `[1,]`, `[,1]`, `{"a"}`, `{"a":}`, `{"a":1,}`, `{a:1}`, `{1:1}`, `[1 2]`, `{"a":1"b":2}`, `{} {}`, `[]x`, `nul`, `nulll`,
		`01`, `-`, `1.`, `.1`, `1e`, `-0.0E+10`, `1.5.2`, `+1`, `"`, `"\`, `"\x"`, `"\u12"`, `"\u12g4"`, `"\u00e9\n\/"`, "\"\t\"", "\"\x00\"", "\x00", "[\x00]",
		`"0123456\"89"`, `"01234567"`, "\"0123\x1f567\"", "\"é\x80\"", "\"\x7f\xff\xe9ab\"",
	} {
		f.Add([]byte(text))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		if ok := valid(b); ok != json.Valid(b) {
			t.Fatalf("%q: valid %t, not %t", b, ok, !ok)
		} else if !ok {
			return
		}
		got := map[string]json.RawMessage{}
		object := Members(b, func(k string, v json.RawMessage) { got[k] = v })
		var want map[string]json.RawMessage
		if json.Unmarshal(b, &want) != nil {
			want = nil
		}
		if object != (want != nil) || object && !reflect.DeepEqual(got, want) {
			t.Errorf("members of %q: %t, %q, not %q", b, object, got, want)
		}
		var all, wanted []json.RawMessage
		array := Elements(b, func(v json.RawMessage) { all = append(all, v) })
		if json.Unmarshal(b, &wanted) != nil {
			wanted = nil
		}
		if array != (wanted != nil) || len(all) != len(wanted) {
			t.Fatalf("elements of %q: %t, %q, not %q", b, array, all, wanted)
		}
		for i := range all {
			if !bytes.Equal(all[i], wanted[i]) {
				t.Errorf("elements of %q: %q, not %q", b, all[i], wanted[i])
			}
		}
	})
}

// When values are replaced, the bytes between them stay the same.
func TestEdit(t *testing.T) {
	const text = " {\n \"a\" : [ 1,{\"b\":2} , 3 ],\t\"c\\u0062\":\"x\" ,\"a\":null} "
	var keys []string
	got := EditMembers([]byte(text), func(key string, value json.RawMessage) []byte {
		keys = append(keys, key)
		if key == "cb" {
			return []byte(`{}`)
		}
		n := 0
		return EditElements(value, func(value json.RawMessage) []byte {
			if n++; n == 2 {
				return []byte("long value")
			}
			return value
		})
	})
	const want = " {\n \"a\" : [ 1,long value , 3 ],\t\"c\\u0062\":{} ,\"a\":null} "
	if string(got) != want || strings.Join(keys, " ") != "a cb a" {
		t.Errorf("%q, keys %q", got, keys)
	}
	for _, other := range []string{"[]", "1", `"text"`, "null", "{}"} {
		if got := EditMembers([]byte(other), func(string, json.RawMessage) []byte { return nil }); string(got) != other {
			t.Errorf("%s became %s", other, got)
		}
	}
}

func TestEditRemoves(t *testing.T) {
	for _, c := range []struct{ text, gone, want string }{
		{"{\n\t\"a\": 1,\n\t\"b\": 2,\n\t\"c\": 3\n}\n", "a", "{\n\t\"b\": 2,\n\t\"c\": 3\n}\n"},
		{"{\n\t\"a\": 1,\n\t\"b\": 2,\n\t\"c\": 3\n}\n", "ab", "{\n\t\"c\": 3\n}\n"},
		{"{\n\t\"a\": 1,\n\t\"b\": 2,\n\t\"c\": 3\n}\n", "b", "{\n\t\"a\": 1,\n\t\"c\": 3\n}\n"},
		{"{\n\t\"a\": 1,\n\t\"b\": 2,\n\t\"c\": 3\n}\n", "bc", "{\n\t\"a\": 1\n}\n"},
		{"{\n\t\"a\": 1,\n\t\"b\": 2\n}\n", "ab", "{}\n"},
		{`{"a":",","b":2 , "a":3}`, "a", `{"b":2}`},
		{` { "a" : 1 } `, "a", ` {} `},
	} {
		got := EditMembers([]byte(c.text), func(key string, value json.RawMessage) []byte {
			if strings.Contains(c.gone, key) {
				return nil
			}
			return value
		})
		if string(got) != c.want {
			t.Errorf("%q without %s is %q, not %q", c.text, c.gone, got, c.want)
		}
	}
	if got := EditElements([]byte("[1, 2,3]"), func(value json.RawMessage) []byte {
		if string(value) == "1" {
			return nil
		}
		return value
	}); string(got) != "[ 2,3]" {
		t.Errorf("%q", got)
	}
}
