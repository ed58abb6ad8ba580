package runtime

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"distkit/runtime/spec"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// Concurrent runs have different IDs. IDs of ended runs are used again.
func TestUsersAreNotShared(t *testing.T) {
	if !rootOfHost() {
		t.Skip("needs root")
	}
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "state")
	all, err := Open(t.TempDir(), "default", dir, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	begin := func(id, users string) (*execution, []specs.LinuxIDMapping, error) {
		c, err := all.Create(t.Context(), Record{ID: id, Users: users}, "", nil)
		if err != nil {
			return nil, nil, err
		}
		if users == MappedUsers {
			config := `{"process":{"args":["x"]},"root":{"path":"rootfs"},"linux":{"uidMappings":[{"containerID":0,"hostID":1000,"size":4294000000}]}}`
			if err := os.WriteFile(filepath.Join(c.Dir(), "config.json"), []byte(config), 0o600); err != nil {
				return nil, nil, err
			}
		}
		u := &execution{Process: c.proc(""), r: &Runtime{command: "runc", state: dir}}
		if u.claim, err = u.claimHost(t.Context()); err != nil {
			return nil, nil, err
		}
		if err := u.enter(state{Detached: true}); err != nil {
			return nil, nil, err
		}
		maps, err := u.mapUsers(t.Context())
		return u, maps, err
	}
	var runs []*execution
	var ranges []idRange
	var lock sync.Mutex
	var wait sync.WaitGroup
	for i := range 16 {
		wait.Go(func() {
			u, maps, err := begin(fmt.Sprint("run", i), AutoUsers)
			if err != nil || len(maps) != 1 || maps[0].ContainerID != 0 || maps[0].Size != spec.AutoUsers {
				t.Errorf("%+v, %v", maps, err)
				return
			}
			lock.Lock()
			defer lock.Unlock()
			r := idRange{maps[0].HostID, maps[0].Size}
			if slices.ContainsFunc(ranges, r.overlaps) {
				t.Errorf("%+v is in %+v", r, ranges)
			}
			ranges, runs = append(ranges, r), append(runs, u)
		})
	}
	wait.Wait()
	if _, _, err := begin("greedy", MappedUsers); !errdefs.IsUnavailable(err) {
		t.Errorf("IDs of others: %v", err)
	}
	// A killed run keeps its IDs until its state is cleared up.
	if err := os.Remove(filepath.Join(runs[0].private, "state.json")); err != nil {
		t.Fatal(err)
	}
	u, maps, err := begin("late", AutoUsers)
	if err != nil || slices.ContainsFunc(ranges[1:], idRange{maps[0].HostID, maps[0].Size}.overlaps) {
		t.Errorf("a later one: %+v, %v", maps, err)
	}
	for _, r := range append(runs, u) {
		r.state.freeUsers()
		if _, err := os.Stat(r.state.Users); !os.IsNotExist(err) {
			t.Errorf("%s is left: %v", r.state.Users, err)
		}
	}
}

// The IDs for containers are those reserved for them, or else the default ones unless others have any of these.
func TestPool(t *testing.T) {
	t.Parallel()
	own, foreign, err := parseSubordinate(strings.NewReader("a:100000:65536\ncontainers:200000:10\nbad\ncontainers:x:1\ncontainers:4294967290:100\nz:0:7\nz:9:0\n"))
	if err != nil || !slices.Equal(own, []idRange{{200000, 10}, {4294967290, 5}}) || !slices.Equal(foreign, []idRange{{100000, 65536}}) {
		t.Errorf("%v %v %v", own, foreign, err)
	}
	used := []usersFile{{Ranges: []idRange{{300000, 65536}}}, {Ranges: []idRange{{100000, 1}, {165536, 5}}}}
	for _, c := range []struct {
		pool  []idRange
		first uint32
		ok    bool
	}{
		{[]idRange{{100000, 65536}}, 0, false},
		{[]idRange{{100000, 131076}}, 0, false},
		{[]idRange{{100000, 131077}}, 165541, true},
		{[]idRange{{100000, 5}, {400000, 65536}}, 400000, true},
		{nil, 0, false},
	} {
		if r, ok := freeRange(c.pool, used); ok != c.ok || ok && r != (idRange{c.first, spec.AutoUsers}) {
			t.Errorf("%+v: %+v, %v", c.pool, r, ok)
		}
	}
}

// A container with its own users has IDs on the host that no other container has.
func TestUsers(t *testing.T) {
	runtimes(t, func(t *testing.T, m *machine) {
		if !rootOfHost() {
			t.Skip("not the host's root")
		}
		o := spec.Options{Args: []string{"sh", "-c", "cat /proc/self/uid_map /proc/self/gid_map; exec sleep 1000"}, UserNS: spec.UserNS{Auto: true}}
		m.spec(o)
		for _, name := range []string{"proc", "dev", "sys"} { // its root can't make them, since it does not own the files
			if err := os.Mkdir(filepath.Join(m.bundle, "rootfs", name), 0o755); err != nil {
				t.Fatal(err)
			}
		}
		_, _, err := m.containers().StartBundle(t.Context(), m.finder, Record{ID: "test-users-out", Bundle: m.bundle, Users: AutoUsers})
		above := filepath.Dir(m.bundle)
		if !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "can't search "+above+":") {
			t.Errorf("below a directory of root's alone: %v", err)
		}
		if err := os.Chmod(above, 0o711); err != nil {
			t.Fatal(err)
		}
		maps := map[string]bool{}
		var all []*Container
		for i := range 2 {
			c := m.detached(Record{ID: fmt.Sprint("test-users-", i), Users: AutoUsers})
			until(t, "its map", func() bool { return strings.Count(m.log(c), "65536") == 2 })
			maps[m.log(c)] = true
			all = append(all, c)
		}
		if len(maps) != 2 {
			t.Errorf("the maps %v", maps)
		}
		for _, c := range all {
			if _, err := c.Remove(t.Context(), true); err != nil {
				t.Error(err)
			}
		}
		left, err := filepath.Glob(filepath.Join(DefaultState(), "users", "test-users-*"))
		if err != nil || len(left) > 0 {
			t.Errorf("left: %q, %v", left, err)
		}
	})
}
