package cli

import (
	"errors"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// aliases are the names that docker, podman and skopeo have for flags of ours that mean the same. They are taken where a command has the
// flag, and are not shown.
var aliases = [...]struct{ alias, flag string }{
	{"authfile", "auth-file"},
	{"name", "id"},
	{"network", "net"},
	{"pids-limit", "pids"},
	{"tty", "terminal"},
	{"ulimit", "rlimit"},
	{"workdir", "cwd"},
}

// translate replaces an alias by the flag that it stands for, unless the command has a flag of that name itself.
func translate(f *pflag.FlagSet, name string) pflag.NormalizedName {
	for _, a := range aliases {
		if a.alias == name && f.Lookup(a.flag) != nil {
			own := false
			f.VisitAll(func(flag *pflag.Flag) { own = own || flag.Name == name })
			if !own {
				return pflag.NormalizedName(a.flag)
			}
		}
	}
	return pflag.NormalizedName(name)
}

// foreign are flags of those tools that have no equal here, with what serves instead in commands that have the flag of.
var foreign = [...]struct{ flag, of, instead string }{
	{"cidfile", "detach", "--detach prints the container's ID"},
	{"creds", "auth-file", "dist-login stores credentials, and --auth-file names a file with them"},
	{"expose", "publish", "--publish HOST:PORT reaches any port"},
	{"gpus", "device", "--device VENDOR/CLASS=NAME gives a device by its CDI name, such as nvidia.com/gpu=all"},
	{"link", "net", "containers of one --net find each other by their host names"},
	{"log-driver", "log", "--log says where the output goes"},
	{"publish-all", "publish", "--publish HOST:PORT names each port"},
	{"restart", "detach", "a supervisor such as systemd restarts containers"},
	{"security-opt", "seccomp", "--seccomp, --apparmor, --selinux-label and --no-new-privs"},
	{"tls-verify", "plain-http", "--insecure takes any certificate, --plain-http speaks no TLS"},
}

// maxMistakes bounds by how many letters a flag may differ from the one that is suggested for it.
const maxMistakes = 2

// instead says, for the error of an unknown flag, what may have been meant.
func instead(c *cobra.Command, err error) string {
	var unknown *pflag.NotExistError
	if !errors.As(err, &unknown) {
		return ""
	}
	name := unknown.GetSpecifiedName()
	for _, f := range foreign {
		if f.flag == name && c.Flags().Lookup(f.of) != nil {
			return ": " + f.instead
		}
	}
	nearest, least := "", min(maxMistakes, len(name)/2)+1
	consider := func(flag string) {
		if n := distance(name, flag); n < least {
			nearest, least = flag, n
		}
	}
	c.Flags().VisitAll(func(f *pflag.Flag) {
		if !f.Hidden {
			consider(f.Name)
		}
	})
	for _, a := range aliases {
		if c.Flags().Lookup(a.alias) != nil {
			consider(a.alias)
		}
	}
	if nearest == "" {
		return ""
	}
	return ": --" + nearest + "?"
}

// distance is how many letters have to be added, removed or replaced to make b of a.
func distance(a, b string) int {
	if len(a) > 64 || max(len(a)-len(b), len(b)-len(a)) > maxMistakes {
		return maxMistakes + 1
	}
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			replace := diagonal
			if a[i] != b[j] {
				replace++
			}
			diagonal = row[j+1]
			row[j+1] = min(replace, row[j]+1, row[j+1]+1)
		}
	}
	return row[len(b)]
}
