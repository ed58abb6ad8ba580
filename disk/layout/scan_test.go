package layout

import (
	"bytes"
	"encoding/json"
	"reflect"
	"testing"
)

// The pieces are those that encoding/json finds.
func FuzzScan(f *testing.F) {
	for _, text := range []string{
		`{}`, `[]`, ` { } `, `null`, `1`, `"{"`, `{"a":1,"b":[1,2,{"c":"]}"}],"a":null}`, `[ 1 , -2.5e3 , true,"\"", {} , [ [ ] ] ]`,
		`{"\u0061\"":"\\","":{}}`, `{"a" : "b:c,d" }`, "\t[\n\"é\" ]", `[[],[[]],{"":[]}]`,
	} {
		f.Add([]byte(text))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		if !json.Valid(b) {
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
