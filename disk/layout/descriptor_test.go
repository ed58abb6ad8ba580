package layout

import (
	"encoding/json"
	"reflect"
	"strings"
	"testing"

	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// entries are descriptors as tools write them, and other texts that look like one.
var entries = []string{
	`{}`,
	`{"mediaType":"a/b","digest":"sha256:0","size":12}`,
	" {\n \"mediaType\" : \"a/b\" , \"digest\" : \"sha256:0\" , \"size\" : 12 , \"annotations\" : { \"a\" : \"b\" } }\n",
	`{"size":-0}`, `{"size":-5}`, `{"size":0,"size":7}`, `{"size":7,"size":0}`, `{"size":9223372036854775807}`, `{"size":9223372036854775808}`,
	`{"size":1.0}`, `{"size":1e3}`, `{"size":"1"}`, `{"size":null}`, `{"size":01}`, `{"size":+1}`, `{"size":true}`,
	`{"digest":null}`, `{"digest":5}`, `{"digest":"a","digest":"b"}`, `{"digest":"","digest":"b"}`, `{"digest":"a","digest":null}`,
	`{"MediaType":"A"}`, `{"mediatype":"A","mediaType":"B"}`, `{"mediaType":"B","MEDIATYPE":"A"}`, `{"media\u0054ype":"A"}`,
	`{"annotations":null}`, `{"annotations":{}}`, `{"annotations":[]}`, `{"annotations":{"a":null}}`, `{"annotations":{"a":1}}`, `{"annotations":{"a":["b"]}}`,
	`{"annotations":{"a":"b","a":"c"}}`, `{"annotations":{"a":"b"},"annotations":{"c":"d"}}`, `{"annotations":{},"annotations":{"c":"d"}}`,
	`{"annotations":{"":"","\u0061":"\ud800","b\u00e9":"\"\\"}}`, "{\"annotations\":{\"\xff\":\"\xfe\"}}",
	`{"artifactType":"x","urls":["u"],"data":"AQI=","platform":{"os":"linux","architecture":"arm64"}}`,
	`{"data":"?"}`, `{"urls":"u"}`, `{"platform":[]}`, `{"unknown":{"deep":[1,{"a":null}]},"size":3}`,
	`[]`, `null`, `"text"`, `5`, `{"size":1}x`, `{"size":1,}`, `{"size" 1}`, `{"annotations":{"a":"b"}`, `{"digest":"a}`,
}

// A descriptor that is decoded without encoding/json has the value that encoding/json decodes.
func TestDescriptorsAreDecodedAsJSON(t *testing.T) {
	t.Parallel()
	for _, raw := range entries {
		compareDescriptor(t, raw)
		compareDescriptor(t, strings.ReplaceAll(raw, ":", " :\t"))
	}
}

func FuzzDescriptor(f *testing.F) {
	for _, raw := range entries {
		f.Add(raw)
	}
	f.Fuzz(compareDescriptor)
}

func compareDescriptor(t *testing.T, raw string) {
	var want v1.Descriptor
	werr := json.Unmarshal([]byte(raw), &want)
	if len(want.Annotations) == 0 {
		want.Annotations = nil
	}
	got, err := Entry{Raw: json.RawMessage(raw)}.Descriptor()
	if (err != nil) != (werr != nil) || err == nil && !reflect.DeepEqual(got, want) {
		t.Errorf("%s\ngot  %+v, %v\nwant %+v, %v", raw, got, err, want, werr)
	}
	if _, ok := (Entry{Raw: json.RawMessage(raw)}).plain(func(string, string) {}); ok && werr != nil {
		t.Errorf("%s is decoded, but %v", raw, werr)
	}
}
