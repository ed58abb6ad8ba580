package hostile

import (
	"bytes"
	"cmp"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"hash/fnv"
	"io/fs"
	"iter"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// hostileCase is one thing that is wrong in a store.
type hostileCase struct {
	path, name string
	change     func(s *stage, path string) error // changes the file or directory at path, in the store under test
}

// sample is the number of files and directories of one kind, such as blobs, that are changed.
const sample = 4

// cases lists the changes of the store: each kind of file and directory of the layout page is replaced in turn.
func (s *stage) cases(t *testing.T) []hostileCase {
	var all []hostileCase
	add := func(path, name string, change func(s *stage, path string) error) {
		all = append(all, hostileCase{path, name, change})
	}
	store := filepath.Join(s.pristine, ".content")
	number := regexp.MustCompile(`^([0-9]+|[0-9a-f]{64})$`)
	seen := map[string]int{}
	err := filepath.WalkDir(store, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, _ := filepath.Rel(store, path)
		parts := strings.Split(rel, "/")
		if rel == "." { // the user names it, and may use a link
			return nil
		}
		if i := slices.Index(parts, "fs"); i >= 0 && i < len(parts)-1 { // a file of a layer, where any file is allowed
			return fs.SkipDir
		}
		for i, p := range parts {
			if number.MatchString(p) {
				parts[i] = "*"
			}
		}
		kind := strings.Join(parts, "/")
		if seen[kind]++; seen[kind] > sample {
			return nil
		}
		for _, m := range replacements {
			if m.dirs && !d.IsDir() || m.toRoot && (os.Geteuid() != 0 || s.uid == 0) {
				continue
			}
			add(rel, m.name, m.change)
		}
		if !d.Type().IsRegular() {
			return nil
		}
		if info, err := d.Info(); err != nil || info.Size() > 64<<10 {
			return err
		}
		text, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		for i, v := range s.variants(text) {
			add(rel, fmt.Sprintf("value %d", i), func(_ *stage, path string) error { return replace(path, v()) })
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	for name, text := range s.planted(t) {
		add(name, "planted", func(_ *stage, path string) error { return replace(path, text) })
		for _, m := range replacements {
			if m.dirs || m.toRoot {
				continue
			}
			add(name, m.name, func(s *stage, path string) error {
				if err := replace(path, text); err != nil {
					return err
				}
				return m.change(s, path)
			})
		}
	}
	for _, dgst := range s.image {
		text, err := os.ReadFile(filepath.Join(store, blob(dgst)))
		if err != nil {
			t.Fatal(err)
		}
		for i, v := range s.variants(text) {
			add(blob(dgst), fmt.Sprintf("named value %d", i), func(s *stage, _ string) error {
				return s.plant(filepath.Join(s.work, ".content"), dgst, v())
			})
		}
	}
	order := func(c hostileCase) uint32 {
		f := fnv.New32a()
		_, _ = f.Write([]byte(strings.ReplaceAll(c.path, s.id, "ID") + c.name))
		return f.Sum32()
	}
	// The order looks random, but is the same in each run.
	slices.SortFunc(all, func(a, b hostileCase) int { return cmp.Compare(order(a), order(b)) })
	return all
}

// planted are files that the prepared store does not have: some that are on the layout page, and some that no current
// distkit writes, but that an older one read.
func (s *stage) planted(t *testing.T) map[string][]byte {
	evil := s.outside + "/evil"
	state := fmt.Appendf(nil, `{"id":%q,"status":"running","pid":%d,"start":1,"runtime":%q,"runtimeState":%q,"cgroups":["/sys/fs/cgroup","/sys/fs/cgroup/pids"],"monitor":{"pid":%[2]d},"pipes":{"stdout":%[4]q}}`,
		s.id, s.canary.Process.Pid, evil, s.outside+"/dir")
	record := fmt.Appendf(nil, `{"id":"planted","namespace":"default","runtime":%q,"network":%q,"connection":{"name":%[2]q,"confDir":%[2]q},"bundle":%[2]q,"remove":true,"owner":{"pid":1},"checkpoint":"../../.."}`,
		evil, s.outside+"/dir")
	spec := fmt.Appendf(nil, `{"ociVersion":"1.0.0","process":{"args":["x"],"cwd":"/"},"root":{"path":"/"},"hooks":{"prestart":[{"path":%q}],"createRuntime":[{"path":%[1]q}],"poststop":[{"path":%[1]q}]},"linux":{"cgroupsPath":"/"}}`, evil)
	own := "containers/default/" + s.id
	files := map[string][]byte{
		"containers/default/planted/container.json": record,
		"containers/default/planted/config.json":    spec,
		"containers/../containers/x/y/state.json":   state,
		own + "/container.json":                     record,
		own + "/state.json":                         state,
		own + "/pid":                                []byte(strconv.Itoa(s.canary.Process.Pid)),
		own + "/log.1":                              []byte("2026-01-01T00:00:00Z stdout F \x1b]0;x\x07\n"),
		own + "/stdin":                              nil,
		own + "/control":                            []byte("eof\n"),
		own + "/checkpoint/inventory.img":           []byte("x"),
		own + "/exec/x/process.json":                []byte(`{"args":["` + evil + `"],"cwd":"/"}`),
		own + "/exec/x/state.json":                  state,
		own + "/exec/x/lock":                        nil,
		own + "/exec/x/exit.json":                   []byte(`{"status":99999999999}`),
		own + "/exec/x/log":                         nil,
		"containers/ci/x/container.json":            record,
		"index.json.new":                            []byte("{}"),
		"namespaces/ci/index.json.new":              []byte("{}"),
		"namespaces/.ci.removed/index.json":         []byte("{}"),
		"namespaces/evil\x1b[2J/index.json":         []byte("{}"),
		"ingest/.tmp-1":                             []byte("x"),
		"blobs/sha256/.tmp-1":                       []byte("x"),
		"events.1":                                  []byte(`{"time":"x","topic":"/content/create"}`),
		"hold":                                      nil,
		"gate":                                      nil,
		"locks/00":                                  nil,
		"locks/namespaces":                          nil,
	}
	for _, driver := range s.drivers {
		dir := "snapshots/" + driver
		ids, err := filepath.Glob(filepath.Join(s.pristine, ".content", dir, "[0-9]*"))
		if err != nil || len(ids) == 0 {
			t.Fatalf("no snapshots of %s: %v", driver, err)
		}
		key := fmt.Sprintf("%x", sha256.Sum256([]byte("default\x00x")))
		for _, id := range ids[max(0, len(ids)-2):] {
			id = filepath.Base(id)
			files[filepath.Join(dir, id, "unresolved")] = []byte(`{"paths":["../../../../../outside/file"]}`)
			files[filepath.Join(dir, id, "unsettled")] = nil
			files[filepath.Join(dir, id, "settle/x")] = nil
		}
		files[dir+"/tmp/1/info"] = []byte("{}")
		files[dir+"/tmp/2/fs/x"] = nil
		files[dir+"/locks/"+key] = nil
		files[dir+"/keys/"+key] = nil
		files[dir+"/userxattr"] = nil
		files[dir+"/99999999999999999999/info"] = []byte(`{"key":"work"}`)
	}
	return files
}

var replacements = []struct {
	name   string
	dirs   bool // only for directories
	toRoot bool // leads to the root directory: only for a user who can't do any harm there
	change func(s *stage, path string) error
}{
	{name: "link to what was there", change: func(s *stage, path string) error {
		moved := filepath.Join(s.outside, "moved")
		if err := os.Rename(path, moved); err != nil {
			return err
		}
		return os.Symlink(moved, path)
	}},
	{name: "link to a file", change: func(s *stage, path string) error { return link(s.outside+"/file", path) }},
	{name: "link to a directory", change: func(s *stage, path string) error { return link(s.outside+"/dir", path) }},
	{name: "link to nothing", change: func(s *stage, path string) error { return link(s.outside+"/created", path) }},
	{name: "link to itself", change: func(_ *stage, path string) error { return link(filepath.Base(path), path) }},
	{name: "link to /", toRoot: true, change: func(_ *stage, path string) error { return link("/", path) }},
	{name: "FIFO", change: func(_ *stage, path string) error { return special(path, unix.S_IFIFO, 0) }},
	{name: "socket", change: func(_ *stage, path string) error { return special(path, unix.S_IFSOCK, 0) }},
	{name: "device", change: func(_ *stage, path string) error {
		if os.Geteuid() != 0 {
			return link("/dev/zero", path)
		}
		return special(path, unix.S_IFCHR, int(unix.Mkdev(1, 5))) // /dev/zero
	}},
	{name: "directory", change: func(_ *stage, path string) error {
		if err := remove(path); err != nil {
			return err
		}
		return os.Mkdir(path, 0o755)
	}},
	{name: "zeros", change: func(_ *stage, path string) error {
		if err := replace(path, nil); err != nil {
			return err
		}
		return os.Truncate(path, 2<<30)
	}},
	{name: "garbage", change: func(_ *stage, path string) error {
		return replace(path, bytes.Repeat([]byte("\x1b]0;x\x07\x00\xff{[\"\n"), 1000))
	}},
	{name: "empty", change: func(_ *stage, path string) error { return replace(path, nil) }},
	{name: "gone", change: func(_ *stage, path string) error { return remove(path) }},
	{name: "many entries", dirs: true, change: func(_ *stage, path string) error {
		n := 1000
		if long() {
			n = 100000
		}
		for i := range n {
			if err := os.WriteFile(filepath.Join(path, strconv.Itoa(1000+i)), nil, 0o644); err != nil {
				return err
			}
		}
		return nil
	}},
	{name: "odd entries", dirs: true, change: func(_ *stage, path string) error {
		for _, name := range []string{"-rf", "a\nb", "\x1b]0;x\x07", "\xff\xfe", "$(touch x)", " ", strings.Repeat("x", 255), ".x", "x/y"} {
			if err := os.MkdirAll(filepath.Join(path, name), 0o755); err != nil {
				return err
			}
		}
		return os.MkdirAll(filepath.Join(path, strings.Repeat("d/", 1000)), 0o755)
	}},
}

// remove moves a file or directory out of the store. Something may be mounted below it, and the files in that stay.
func remove(path string) error {
	work, _, _ := strings.Cut(path, "/.content/")
	dir, err := os.MkdirTemp(work, "removed-")
	if err != nil {
		return err
	}
	if err := os.Rename(path, filepath.Join(dir, "x")); !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, unix.ENOTDIR) {
		return err
	}
	return nil
}

func link(target, path string) error {
	if err := remove(path); err != nil {
		return err
	}
	return os.Symlink(target, path)
}

func special(path string, kind uint32, dev int) error {
	if err := remove(path); err != nil {
		return err
	}
	return unix.Mknod(path, kind|0o644, dev)
}

// replace writes a file with this text at path, and makes the directories above it.
func replace(path string, text []byte) error {
	if err := remove(path); err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	return os.WriteFile(path, text, 0o644)
}

// plant replaces one of the image's blobs, and writes the documents above it again with the new digest and size, so
// that the name leads to the new blob and all digests are correct.
func (s *stage) plant(store, old string, text []byte) error {
	for i := slices.Index(s.image, old); i < len(s.image); i++ {
		added := fmt.Sprintf("sha256:%x", sha256.Sum256(text))
		if err := replace(filepath.Join(store, blob(added)), text); err != nil {
			return err
		}
		above := "index.json"
		if i+1 < len(s.image) {
			above = blob(s.image[i+1])
		}
		doc, err := os.ReadFile(filepath.Join(store, above))
		if err != nil {
			return err
		}
		size := regexp.MustCompile(`("digest": *"` + s.image[i] + `", *"size": *)[0-9]+`)
		doc = size.ReplaceAll(doc, fmt.Appendf(nil, "${1}%d", len(text)))
		if text = bytes.ReplaceAll(doc, []byte(s.image[i]), []byte(added)); bytes.Equal(text, doc) {
			return fmt.Errorf("%s does not refer to %s", above, s.image[i])
		}
	}
	return replace(filepath.Join(store, "index.json"), text)
}

// blob returns the name of a blob's file in a store.
func blob(dgst string) string { return filepath.Join("blobs", strings.Replace(dgst, ":", "/", 1)) }

// variants replace a file by one with hostile values, one at a time. They are functions because the memory of this
// process counts as that of its children until they call exec.
func (s *stage) variants(text []byte) []func() []byte {
	evil := s.outside + "/evil"
	values := []func() any{
		value("../../../../outside/file"), value(evil), value(s.outside + "/dir"), value("$(touch " + s.outside + "/executed)"),
		value("a[$(touch " + s.outside + "/executed)]"), value("\x1b]0;x\x07\n"), value(""), func() any { return strings.Repeat("x", 1<<20) },
		value(-1), value(1e308), value(json.Number("99999999999999999999999")), value(s.canary.Process.Pid),
		value(nil), value([]any{}), value(map[string]any{}), value(true), value("\u202e\u0085\u009b2J\x7f"), value("./build.sh"), value("-x"),
	}
	var all []func() []byte
	var doc any
	d := json.NewDecoder(bytes.NewReader(text))
	d.UseNumber()
	if d.Decode(&doc) != nil {
		for _, v := range values {
			all = append(all, func() []byte { return fmt.Appendf(nil, "%v\n", v()) })
		}
		return all
	}
	all = append(all,
		func() []byte { return bytes.Repeat([]byte("["), 100000) },
		func() []byte { return bytes.Repeat([]byte(`{"a":`), 100000) },
		func() []byte { return fmt.Appendf(nil, `{"manifests":[%s{}]}`, strings.Repeat("{},", 100000)) },
		func() []byte { return fmt.Appendf(nil, `{"layers":[%s{}]}`, strings.Repeat("{},", 100000)) },
		func() []byte {
			return fmt.Appendf(nil, `{"rootfs":{"diff_ids":[%s""]}}`, strings.Repeat(`"",`, 100000))
		},
		func() []byte {
			var b bytes.Buffer
			for i := range 100000 {
				fmt.Fprintf(&b, `,"%d":""`, i)
			}
			return fmt.Appendf(nil, `{"labels":{%s},"annotations":{%[1]s}}`, b.Bytes()[1:])
		},
	)
	paths := slices.Collect(leaves(doc, nil))
	each := 2 // the number of values in each place; which ones depends on the place, so that each is used somewhere
	if long() {
		each = 6
	}
	for i, path := range paths {
		if len(paths) > 100 && i%4 > 0 { // one of many similar ones, as in a list of system calls
			continue
		}
		for k := range each {
			v := values[(2*i+k)*5%len(values)]
			all = append(all, func() []byte {
				changed, err := json.Marshal(with(doc, path, v()))
				if err != nil {
					panic(err)
				}
				return changed
			})
		}
	}
	return all
}

func value(v any) func() any { return func() any { return v } }

// leaves returns the paths of all values in a JSON document, including objects and lists.
func leaves(doc any, path []any) iter.Seq[[]any] {
	return func(yield func([]any) bool) {
		if len(path) > 0 && !yield(slices.Clone(path)) {
			return
		}
		below := func(key, value any) bool {
			for p := range leaves(value, append(slices.Clone(path), key)) {
				if !yield(p) {
					return false
				}
			}
			return true
		}
		switch doc := doc.(type) {
		case map[string]any:
			for _, k := range slices.Sorted(maps.Keys(doc)) {
				if !below(k, doc[k]) {
					return
				}
			}
		case []any:
			for i := range min(len(doc), 2) {
				if !below(i, doc[i]) {
					return
				}
			}
		}
	}
}

// with returns a copy of the document that has another value at path.
func with(doc any, path []any, value any) any {
	if len(path) == 0 {
		return value
	}
	switch key := path[0].(type) {
	case string:
		copied := maps.Clone(doc.(map[string]any))
		copied[key] = with(copied[key], path[1:], value)
		return copied
	default:
		copied := slices.Clone(doc.([]any))
		copied[key.(int)] = with(copied[key.(int)], path[1:], value)
		return copied
	}
}
