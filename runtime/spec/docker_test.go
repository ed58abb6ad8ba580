package spec

import (
	"encoding/json"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/moby/profiles/seccomp"
	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// fields returns the fields of a specification by the names in run-spec(1)'s table. Values with the same meaning are
// made equal: lists of names are sorted, and sizes are in bytes.
func fields(t *testing.T, s *specs.Spec) map[string]any {
	t.Helper()
	b, err := json.Marshal(s)
	if err != nil {
		t.Fatal(err)
	}
	var top map[string]any
	if err := json.Unmarshal(b, &top); err != nil {
		t.Fatal(err)
	}
	all := map[string]any{}
	for name, value := range top {
		switch name {
		case "process", "linux":
			for below, value := range value.(map[string]any) {
				all[name+"."+below] = normal(value)
			}
		case "mounts":
			for _, m := range value.([]any) {
				all["mounts: "+m.(map[string]any)["destination"].(string)] = normal(m)
			}
		default:
			all[name] = value
		}
	}
	return all
}

func normal(v any) any {
	switch v := v.(type) {
	case map[string]any:
		for name, value := range v {
			v[name] = normal(value)
		}
	case []any:
		slices.SortStableFunc(v, func(a, b any) int { return strings.Compare(document(a), document(b)) })
		for i := range v {
			v[i] = normal(v[i])
		}
	case string:
		if kib, ok := strings.CutPrefix(v, "size="); ok {
			if n, err := strconv.Atoi(strings.TrimSuffix(kib, "k")); err == nil && strings.HasSuffix(kib, "k") {
				return "size=" + strconv.Itoa(n<<10)
			}
		}
	}
	return v
}

func document(v any) string {
	b, _ := json.Marshal(v)
	return string(b)
}

// run-spec(1)'s table must name every field of docker's specification and of ours, and say correctly which are equal.
func TestTableAgainstDocker(t *testing.T) {
	t.Parallel()
	b, err := os.ReadFile(filepath.Join("testdata", "docker.json"))
	if err != nil {
		t.Fatal(err)
	}
	var docker specs.Spec
	if err := json.Unmarshal(b, &docker); err != nil {
		t.Fatal(err)
	}
	if docker.Linux.Seccomp, err = seccomp.GetDefaultProfile(&docker); err != nil {
		t.Fatal(err)
	}
	host := testHost
	host.CgroupV2, host.MaskedPaths = true, []string{"/sys/devices/system/cpu/cpu0/thermal_throttle"}
	made, err := New(image(t, `{"config":{"Cmd":["sh"]}}`), Options{Hostname: "0123456789ab", Host: host})
	if err != nil {
		t.Fatal(err)
	}
	theirs, ours := fields(t, &docker), fields(t, made)

	page, err := os.ReadFile("../../cmd/run-spec/run-spec.1.md")
	if err != nil {
		t.Fatal(err)
	}
	_, table, _ := strings.Cut(string(page), "|---|---|---|\n")
	table, _, _ = strings.Cut(table, "\n\n")
	rows := map[string]bool{}
	for line := range strings.Lines(table) {
		cells := strings.Split(line, "|")
		if len(cells) != 5 {
			t.Fatalf("a row has %d cells: %s", len(cells)-2, line)
		}
		names, verdict := strings.Split(strings.TrimSpace(cells[1]), ", "), strings.TrimSpace(cells[2])
		for _, name := range names {
			if strings.HasPrefix(name, "/") {
				name = "mounts: " + name
			}
			rows[name] = true
			their, have := theirs[name]
			our, made := ours[name]
			if !have && !made {
				t.Errorf("the table has %s, which is in neither specification", name)
			}
			if same := have && made && reflect.DeepEqual(their, our); same != (verdict == "same") || !same && verdict != "different" {
				t.Errorf("the table says that %s is %s:\n docker's %.500s\n ours     %.500s", name, verdict, document(their), document(our))
			}
			if verdict == "different" && strings.TrimSpace(cells[3]) == "" {
				t.Errorf("the table does not say why %s is different", name)
			}
		}
	}
	for _, all := range []map[string]any{theirs, ours} {
		for name := range all {
			if !rows[name] {
				t.Errorf("the table lacks %s", name)
			}
		}
	}
}
