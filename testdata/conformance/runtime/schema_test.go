// Package runtime_test validates the specs that run-spec writes, which are in runtime's golden files, with the JSON
// schema of the runtime specification.
package runtime_test

import (
	"bytes"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/santhosh-tekuri/jsonschema/v6"
)

// loader reads a schema file. Some references to these lack a slash.
type loader struct{}

func (loader) Load(url string) (any, error) {
	b, err := os.ReadFile(strings.TrimPrefix(url, "file://"))
	if err != nil {
		return nil, err
	}
	return jsonschema.UnmarshalJSON(bytes.NewReader(bytes.ReplaceAll(b, []byte("#definitions"), []byte("#/definitions"))))
}

func TestSpecsPassTheSchema(t *testing.T) {
	cmd := exec.Command("go", "list", "-m", "-f", "{{.Dir}}", "github.com/opencontainers/runtime-spec")
	out, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	compiler := jsonschema.NewCompiler()
	compiler.DefaultDraft(jsonschema.Draft4) // some of its files don't state theirs
	compiler.UseLoader(loader{})
	schema, err := compiler.Compile(filepath.Join(strings.TrimSpace(string(out)), "schema", "config-schema.json"))
	if err != nil {
		t.Fatal(err)
	}
	files, err := filepath.Glob("../../../runtime/spec/testdata/*.json")
	if err != nil || len(files) < 4 {
		t.Fatalf("golden files: %q, %v", files, err)
	}
	for _, file := range files {
		t.Run(filepath.Base(file), func(t *testing.T) {
			b, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			var spec map[string]any
			if err := json.Unmarshal(b, &spec); err != nil {
				t.Fatal(err)
			}
			if err := schema.Validate(spec); err != nil {
				t.Error(err)
			}
			spec["root"] = map[string]any{"path": 1.0}
			if schema.Validate(spec) == nil {
				t.Error("the schema takes anything")
			}
		})
	}
}
