// Package specflags has the flags that say how an image becomes a runtime specification. run-spec and task create have
// all of them. task restore has those that give a container more than the defaults, which a checkpoint can't grant
// itself.
package specflags

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"distkit/cmd/internal/cli"
	"distkit/cmd/internal/sibling"
	"distkit/errclass"
	"distkit/runtime/spec"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"github.com/spf13/pflag"
)

// Flags are the values of the flags.
type Flags struct {
	o                                              spec.Options // values that need no parsing
	set                                            *pflag.FlagSet
	entrypoint, shmSize, userns                    string
	oomScoreAdj                                    int
	init                                           bool
	limits                                         *Limits
	env, envFiles, mounts, volumes, tmpfs, rlimits []string
	devices, annotations, sysctls                  []string
}

// Grants registers the flags that give a container more than the defaults.
func Grants(f *pflag.FlagSet) *Flags {
	w := &Flags{set: f}
	f.StringArrayVar(&w.annotations, "annotation", nil, "add the annotation `NAME=VALUE`")
	f.StringSliceVar(&w.o.CapAdd, "cap-add", nil, "add the `CAPABILITY`, or ALL")
	f.StringArrayVar(&w.devices, "device", nil, "give the host's device `SOURCE[:TARGET][:rwm]`, all below a directory, or the CDI device VENDOR/CLASS=NAME")
	f.StringArrayVar(&w.mounts, "mount", nil, "mount `type=TYPE,src=SOURCE,dst=TARGET[,ro][,options=A:B]`")
	f.StringVar(&w.o.Rootfs, "rootfs", "", "the container's root filesystem `DIR`, where users are looked up (default \"rootfs\" in the bundle, users by number)")
	f.StringVar(&w.o.Seccomp, "seccomp", "", "filter system calls by the `PROFILE` in a file; unconfined for no filter (default docker's: default)")
	f.StringArrayVar(&w.sysctls, "sysctl", nil, "set the namespaced sysctl `NAME=VALUE`")
	f.StringArrayVarP(&w.volumes, "volume", "v", nil, "mount the host's `SOURCE:TARGET[:OPTION,…]`")
	return w
}

// Register registers all flags except --net and --label, which have different meanings in different commands.
func Register(f *pflag.FlagSet) *Flags {
	w := Grants(f)
	f.StringVar(&w.o.AppArmor, "apparmor", "", "confine by the AppArmor `PROFILE`, which is loaded")
	f.StringSliceVar(&w.o.CapDrop, "cap-drop", nil, "drop the `CAPABILITY`, or ALL")
	f.StringVarP(&w.o.Cwd, "cwd", "w", "", "the working `DIR` (default: the image's)")
	f.StringVar(&w.entrypoint, "entrypoint", "", "run `FILE` instead of the image's entrypoint and command; empty for neither")
	f.Lookup("entrypoint").Annotations = map[string][]string{cli.MayBeEmpty: nil}
	f.StringArrayVarP(&w.env, "env", "e", nil, "set `NAME=VALUE`; NAME alone takes this process's value, or removes the variable")
	f.StringArrayVar(&w.envFiles, "env-file", nil, "set the variables in `FILE`, one a line")
	f.StringArrayVar(&w.o.GroupAdd, "group-add", nil, "let the process be in the `GROUP`, too, a name or a number (can be repeated)")
	f.StringVar(&w.o.Hostname, "hostname", "", "the host `NAME` in the container")
	f.BoolVar(&w.o.NoNewPrivileges, "no-new-privs", false, "keep setuid programs from gaining privileges")
	f.IntVar(&w.oomScoreAdj, "oom-score-adj", 0, "make the OOM killer prefer (`N` up to 1000) or spare (down to -1000) the process (default: the caller's)")
	f.BoolVar(&w.o.Privileged, "privileged", false, "every capability and device, nothing masked; no seccomp filter unless --seccomp")
	f.BoolVar(&w.o.ReadOnly, "read-only", false, "mount the root filesystem read-only")
	f.StringArrayVar(&w.rlimits, "rlimit", nil, "set the limit `NAME=SOFT[:HARD]`, nofile=1024 for example")
	f.StringVar(&w.o.SELinuxLabel, "selinux-label", "", "the SELinux `LABEL` of the process")
	f.StringVar(&w.o.SELinuxMountLabel, "selinux-mount-label", "", "the SELinux `LABEL` of the mounts that the runtime makes")
	f.BoolVar(&w.init, "init", false, "run the command below an init, which forwards signals and waits for orphans")
	for _, ns := range []struct {
		flag, what string
		to         *spec.Sharing
	}{{"pid", "PID", &w.o.PID}, {"ipc", "IPC", &w.o.IPC}, {"uts", "UTS", &w.o.UTS}} {
		f.StringVar((*string)(ns.to), ns.flag, "", "the `"+ns.what+"` namespace: host, container:ID, or a path (default its own)")
	}
	f.StringVar(&w.userns, "userns", "", "a user namespace of its own: auto, or `CONTAINER:HOST:SIZE[,…]` for the IDs (default host: none)")
	f.StringVar(&w.shmSize, "shm-size", "", "the `SIZE` of /dev/shm (default 64m)")
	f.BoolVarP(&w.o.Terminal, "terminal", "t", false, "give the process a terminal")
	f.StringArrayVar(&w.tmpfs, "tmpfs", nil, "mount a tmpfs on `TARGET[:OPTION,…]`")
	f.StringVarP(&w.o.User, "user", "u", "", "run as `USER[:GROUP]`, names or numbers (default: the image's)")
	w.limits = RegisterLimits(f)
	return w
}

// Annotations registers another name for --annotation.
func (w *Flags) Annotations(name, usage string) {
	w.set.StringArrayVar(&w.annotations, name, nil, usage)
}

// Network registers --net with a default value.
func (w *Flags) Network(value, usage string) { w.set.StringVar(&w.o.Network, "net", value, usage) }

// Names registers the flags for the files that resolve names.
func Names(f *pflag.FlagSet) *spec.Names {
	n := &spec.Names{}
	f.StringArrayVar(&n.Hosts, "add-host", nil, "add the host `NAME:ADDRESS` to /etc/hosts; host-gateway is this host's address (can be repeated)")
	f.StringArrayVar(&n.Servers, "dns", nil, "ask the name server at `ADDRESS` instead of this host's (can be repeated)")
	f.StringArrayVar(&n.Options, "dns-option", nil, "set the `OPTION` of resolv.conf(5) instead of this host's (can be repeated)")
	f.StringArrayVar(&n.Search, "dns-search", nil, "search the `DOMAIN` instead of this host's; . for none (can be repeated)")
	return n
}

// Options returns the options that the flags set, for this host.
func (w *Flags) Options() (spec.Options, error) {
	o := w.o
	o.Host = spec.ThisHost()
	if w.set.Changed("entrypoint") {
		o.Entrypoint = new([]string)
		if w.entrypoint != "" {
			*o.Entrypoint = []string{w.entrypoint}
		}
	}
	var err error
	if w.init {
		if o.Init, err = initProgram(); err != nil {
			return o, err
		}
	}
	if w.set.Changed("oom-score-adj") {
		o.OOMScoreAdj = &w.oomScoreAdj
	}
	if w.limits != nil {
		if o.Limits, err = w.limits.Get(); err != nil {
			return o, err
		}
	}
	if o.UserNS, err = spec.ParseUserNS(w.userns); err != nil {
		return o, err
	}
	if w.shmSize != "" {
		if o.ShmSize, err = spec.ParseSize(w.shmSize); err == nil && o.ShmSize == 0 {
			err = cli.Usagef("0 bytes are too few")
		}
		if err != nil {
			return o, fmt.Errorf("--shm-size: %w", err)
		}
	}
	if o.Env, err = w.environment(o.Env); err != nil {
		return o, err
	}
	for _, list := range []struct {
		values []string
		parse  func(string) (specs.Mount, error)
	}{{w.mounts, spec.ParseMount}, {w.volumes, spec.ParseVolume}, {w.tmpfs, spec.ParseTmpfs}} {
		if o.Mounts, err = parse(o.Mounts, list.values, list.parse); err != nil {
			return o, err
		}
	}
	if o.Rlimits, err = parse(o.Rlimits, w.rlimits, spec.ParseRlimit); err != nil {
		return o, err
	}
	if err := w.addDevices(&o); err != nil {
		return o, err
	}
	o.Annotations, o.Sysctls = map[string]string{}, map[string]string{}
	for _, v := range w.annotations {
		name, value, _ := strings.Cut(v, "=")
		if name == "" {
			return o, cli.Usagef("annotation %q is not NAME=VALUE", v)
		}
		o.Annotations[name] = value
	}
	for _, v := range w.sysctls {
		name, value, ok := strings.Cut(v, "=")
		if !ok {
			return o, cli.Usagef("sysctl %q is not NAME=VALUE", v)
		}
		o.Sysctls[name] = value
	}
	return o, nil
}

// environment appends the variables of --env-file, and then those of --env.
func (w *Flags) environment(env []string) ([]string, error) {
	for _, name := range w.envFiles {
		more, err := readEnv(name)
		if err != nil {
			return nil, fmt.Errorf("--env-file: %w", err)
		}
		env = append(env, more...)
	}
	for _, v := range w.env {
		env = append(env, spec.ParseEnv(v))
	}
	return env, nil
}

// addDevices adds the devices of --privileged and --device.
func (w *Flags) addDevices(o *spec.Options) (err error) {
	if o.Privileged {
		// The only devices in a machine's /dev may be those that every container has.
		if o.Devices, err = spec.HostDevices("/dev", "/dev", "rwm"); err != nil && !errdefs.IsInvalidArgument(err) {
			return err
		}
	}
	for _, v := range w.devices {
		if isCDI(v) {
			o.CDI = append(o.CDI, v)
			continue
		}
		devices, err := spec.ParseDevice(v)
		if err != nil {
			return err
		}
		o.Devices = append(o.Devices, devices...)
	}
	return nil
}

// isCDI reports whether a device is one of the Container Device Interface, VENDOR/CLASS=NAME, not a path.
func isCDI(device string) bool {
	class, _, ok := strings.Cut(device, "=")
	return ok && strings.Contains(class, "/") && class[0] != '/' && class[0] != '.'
}

// Document returns a specification as JSON, with the Container Device Interface's devices, which run-cdi adds.
func Document(ctx context.Context, s *specs.Spec, cdi []string) ([]byte, error) {
	b := &bytes.Buffer{}
	enc := json.NewEncoder(b)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(s); err != nil || len(cdi) == 0 {
		return b.Bytes(), err
	}
	out, _, err := sibling.Run(ctx, b, "run-cdi", append([]string{"--"}, cdi...)...)
	if err != nil {
		return nil, fmt.Errorf("--device: %w", err)
	}
	return out, nil
}

// initProgram returns the path of task, which is an init too. Only the one installed with this program is used, not
// another program of that name.
func initProgram() (string, error) {
	if name := sibling.Path("task"); filepath.IsAbs(name) {
		return name, nil
	}
	return "", errclass.Errorf(errdefs.ErrNotImplemented, "--init: task is not installed with this program, which is the init")
}

// parse appends the parsed values to to.
func parse[T any](to []T, values []string, one func(string) (T, error)) ([]T, error) {
	for _, v := range values {
		t, err := one(v)
		if err != nil {
			return nil, err
		}
		to = append(to, t)
	}
	return to, nil
}

// ReadOnce returns the flag of a file of variables that can be read only once, such as a shell's <(…), or "".
func (w *Flags) ReadOnce() string {
	for _, name := range w.envFiles {
		if IsStream(name) {
			return "--env-file " + name
		}
	}
	return ""
}

// IsStream reports whether a file exists and is not a regular file.
func IsStream(name string) bool {
	info, err := os.Stat(name)
	return err == nil && !info.Mode().IsRegular()
}

func readEnv(name string) ([]string, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	env, err := spec.ReadEnv(f)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return env, nil
}
