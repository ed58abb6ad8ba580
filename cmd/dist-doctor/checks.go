package main

import (
	"bytes"
	"cmp"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"

	"distkit/cmd/internal/sibling"
	"distkit/content"
	"distkit/remotes"
	oci "distkit/runtime"
	"distkit/runtime/network"

	"github.com/dustin/go-humanize"
	"golang.org/x/sys/unix"
)

func one(subject, state, found, advice string) []finding {
	return []finding{{subject, state, found, advice}}
}

// output runs a program that tells something, and returns what it prints; of one that fails, why.
func output(ctx context.Context, name string, args ...string) (string, error) {
	c := exec.CommandContext(ctx, name, args...)
	var stdout, stderr bytes.Buffer
	c.Stdout, c.Stderr = &stdout, &stderr
	if err := c.Run(); err != nil {
		text := strings.TrimSpace(stderr.String())
		return "", fmt.Errorf("%s", cmp.Or(strings.TrimPrefix(text, filepath.Base(name)+": "), err.Error()))
	}
	return stdout.String(), nil
}

func system(context.Context) []finding {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return one("kernel", limited, err.Error(), "")
	}
	found := strings.Join([]string{unix.ByteSliceToString(u.Sysname[:]), unix.ByteSliceToString(u.Release[:]), runtime.GOARCH}, " ")
	if runtime.GOOS != "linux" {
		return one("kernel", limited, found, "images are moved and looked at here; unpacking and running them takes Linux")
	}
	return one("kernel", ok, found, "")
}

// tools are the programs of others that ours call or that the pages use.
func tools(ctx context.Context) (found []finding) {
	for _, t := range []struct{ name, state, purpose string }{
		{"bash", missing, "the workflows are bash scripts"},
		{"jq", limited, "dist-static, dist-commit, dist-mutate and the remotes over http and rclone use it, as examples do"},
		{"ssh", "", "other machines' stores"},
		{"rclone", "", "object storage"},
		{"criu", "", "task checkpoint"},
	} {
		path, err := exec.LookPath(t.name)
		switch {
		case err == nil:
			found = append(found, finding{t.name, ok, path, ""})
		case t.state != "":
			found = append(found, finding{t.name, t.state, "not on PATH", "install " + t.name + ": " + t.purpose})
		default:
			found = append(found, finding{t.name, limited, "not on PATH", "only for " + t.purpose})
		}
	}
	return found
}

func user(ctx context.Context) []finding {
	if os.Geteuid() == 0 {
		return one("user", ok, "root", "")
	}
	who := fmt.Sprintf("user ID %d", os.Geteuid())
	if _, err := output(ctx, sibling.Path("dist-userns"), "--", "true"); err != nil {
		return one("user", limited, who+": "+err.Error(), "images can be moved and looked at, but not unpacked or run: dist-userns(1)")
	}
	return one("user", ok, who+", with subordinate IDs", "")
}

// drivers asks snap, which knows them.
func drivers(ctx context.Context, root string) (found []finding) {
	listed, err := output(ctx, sibling.Path("snap"), "drivers", "--root", root)
	if err != nil {
		return one("driver", missing, err.Error(), "")
	}
	for line := range strings.Lines(listed) {
		cells := strings.Split(strings.TrimSuffix(line, "\n"), "\t")
		if len(cells) < 3 {
			continue
		}
		f := finding{"driver " + cells[0], ok, cells[1], ""}
		if cells[1] == "unusable" {
			f.State, f.Found = limited, cells[2]
		}
		found = append(found, f)
	}
	return found
}

func runtimes(ctx context.Context) (found []finding) {
	for _, name := range []string{"runc", "crun"} {
		r, err := oci.Find(name, "/")
		if err != nil {
			continue
		}
		version, err := output(ctx, r.Command(), "--version")
		if err != nil {
			found = append(found, finding{name, limited, r.Command() + ": " + err.Error(), "it can't be run"})
			continue
		}
		version, _, _ = strings.Cut(version, "\n")
		found = append(found, finding{name, ok, r.Command() + ", " + version, ""})
	}
	if found == nil {
		found = one("runtime", missing, "neither runc nor crun", "install one, to run containers")
	}
	return found
}

func cgroups(context.Context) []finding {
	own, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return one("cgroups", limited, err.Error(), "containers have no limits and no statistics")
	}
	isRoot := os.Geteuid() == 0
	controllers, err := os.ReadFile("/sys/fs/cgroup/cgroup.controllers")
	if err != nil {
		if !isRoot {
			return one("cgroups", limited, "version 1", "an ordinary user's containers have no limits with it")
		}
		return one("cgroups", ok, "version 1", "")
	}
	found := "version 2: " + strings.TrimSpace(string(controllers))
	for line := range strings.Lines(string(own)) {
		path, isV2 := strings.CutPrefix(strings.TrimSuffix(line, "\n"), "0::")
		if isV2 && !isRoot && unix.Access(filepath.Join("/sys/fs/cgroup", path, "cgroup.procs"), unix.W_OK) != nil {
			return one("cgroups", limited, found+", not delegated", "for limits: systemd-run --user --scope -p Delegate=yes COMMAND")
		}
	}
	return one("cgroups", ok, found, "")
}

func networks(context.Context) []finding {
	for _, dir := range network.PluginDirs() {
		if unix.Access(filepath.Join(dir, "bridge"), unix.X_OK) == nil {
			return one("network", ok, "CNI plugins in "+dir, "")
		}
	}
	return one("network", limited, "no CNI plugins", "install them (Debian: containernetworking-plugins) for --net bridge")
}

// networked are file systems on which other machines write.
var networked = map[int64]string{
	unix.NFS_SUPER_MAGIC: "NFS", unix.CIFS_SUPER_MAGIC: "CIFS", unix.SMB2_SUPER_MAGIC: "SMB", unix.FUSE_SUPER_MAGIC: "FUSE",
	unix.V9FS_MAGIC: "9P", unix.CEPH_SUPER_MAGIC: "Ceph", unix.AFS_SUPER_MAGIC: "AFS",
}

func store(root string) []finding {
	absolute, err := filepath.Abs(root)
	if err != nil {
		return one("store", missing, err.Error(), "")
	}
	at := absolute
	for at != "/" {
		if _, err := os.Stat(at); err == nil {
			break
		}
		at = filepath.Dir(at)
	}
	var fs unix.Statfs_t
	if err := unix.Statfs(at, &fs); err != nil {
		return one("store", missing, fmt.Sprintf("%s: %v", at, err), "")
	}
	space := humanize.IBytes(fs.Bavail*uint64(fs.Bsize)) + " free"
	if name := networked[int64(fs.Type)]; name != "" {
		space += ", on " + name
	}
	if at != absolute {
		return one("store", ok, "none at "+absolute+" yet, "+space, "the first dist-pull makes it")
	}
	if _, err := content.Open(root); err != nil {
		return one("store", missing, err.Error(), "")
	}
	return one("store", ok, absolute+", "+space, "")
}

func hosts(o remotes.Options) []finding {
	var found []finding
	if hosts := remotes.ConfiguredHosts(o); len(hosts) > 0 {
		found = one("hosts", ok, strings.Join(hosts, " "), "")
	}
	if _, err := os.Stat("/etc/containers/registries.conf"); err == nil && found == nil {
		found = one("hosts", limited, "/etc/containers/registries.conf is not read", "dist-hosts makes hosts.toml files of it")
	}
	for _, name := range []string{"HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy"} {
		if os.Getenv(name) != "" {
			found = append(found, finding{"proxy", ok, name + " is set", ""})
		}
	}
	return found
}

func credentials(o remotes.Options) (found []finding) {
	for _, f := range remotes.AuthFiles(o) {
		what := f.Path + ": " + strings.Join(f.Hosts, " ")
		if f.Default != "" {
			what += " and what docker-credential-" + f.Default + " knows"
		}
		if f.Err != nil {
			found = append(found, finding{"credentials", limited, f.Err.Error(), "mend or remove the file: dist-login writes a new one"})
			continue
		}
		found = append(found, finding{"credentials", ok, what, ""})
	}
	if found == nil {
		found = one("credentials", ok, "none", "dist-login HOST stores some")
	}
	return found
}

// names finds programs of others that have a name of ours and come before it.
func names(context.Context) (found []finding) {
	for _, name := range []string{"snap", "run", "task"} {
		path, err := exec.LookPath(name)
		if err != nil {
			found = append(found, finding{name, limited, "not on PATH", "call it by distkit, or add the directories of distkit --exec-path to PATH"})
			continue
		}
		ours, err := os.Stat(sibling.Path(name))
		if theirs, err2 := os.Stat(path); err == nil && err2 == nil && !os.SameFile(ours, theirs) {
			found = append(found, finding{name, limited, path + " is another program", "call ours by distkit"})
		}
	}
	return found
}
