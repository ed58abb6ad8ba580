package cli

import (
	"os"

	"github.com/spf13/pflag"
)

// Root registers --root, the store's directory: flag, $DIST_ROOT, ./.content.
func Root(f *pflag.FlagSet) *string {
	return envString(f, "root", "DIST_ROOT", ".content", "the store's `DIR`")
}

// Namespace registers --namespace, the partition of names: flag, $CONTAINERD_NAMESPACE, default.
func Namespace(f *pflag.FlagSet) *string {
	return envString(f, "namespace", "CONTAINERD_NAMESPACE", "default", "the `NAMESPACE` of names")
}

// envString is a string flag whose default an environment variable can set; help shows the
// built-in default whatever the environment.
func envString(f *pflag.FlagSet, name, env, value, usage string) *string {
	p := f.String(name, value, usage+" (env "+env+")")
	if v := os.Getenv(env); v != "" {
		*p = v
	}
	return p
}
