# SPDX-License-Identifier: Apache-2.0
# lora::lora (the core) and lora::io (the files). Both need Eigen alone.

# Without a version: Eigen 5 would refuse a request for 3.4.
find_package(Eigen3 REQUIRED NO_MODULE)
if(Eigen3_VERSION VERSION_LESS 3.4)
  message(FATAL_ERROR "lora needs Eigen 3.4 or later; found ${Eigen3_VERSION}")
endif()

add_library(lora_lora INTERFACE)
add_library(lora::lora ALIAS lora_lora)
set_target_properties(lora_lora PROPERTIES EXPORT_NAME lora)
target_compile_features(lora_lora INTERFACE cxx_std_20)
target_link_libraries(lora_lora INTERFACE Eigen3::Eigen)
target_sources(lora_lora INTERFACE FILE_SET HEADERS BASE_DIRS "${PROJECT_SOURCE_DIR}/include" FILES
  include/lora/adapter.hpp
  include/lora/adapter_set.hpp
  include/lora/advise.hpp
  include/lora/any_kind.hpp
  include/lora/apply.hpp
  include/lora/batch.hpp
  include/lora/bounds.hpp
  include/lora/concepts.hpp
  include/lora/delta.hpp
  include/lora/dora.hpp
  include/lora/mixed_bounds.hpp
  include/lora/detail/argument_kinds.hpp
  include/lora/detail/call_parts.hpp
  include/lora/detail/convert.hpp
  include/lora/detail/delta_rows.hpp
  include/lora/detail/eigen.hpp
  include/lora/detail/error_terms.hpp
  include/lora/detail/merge_steps.hpp
  include/lora/detail/mistaken_calls.hpp
  include/lora/detail/mix_forms.hpp
  include/lora/detail/name_match.hpp
  include/lora/detail/operands.hpp
  include/lora/detail/overlap.hpp
  include/lora/detail/part_list.hpp
  include/lora/detail/refusals.hpp
  include/lora/detail/row_change.hpp
  include/lora/detail/row_norms.hpp
  include/lora/detail/row_pass.hpp
  include/lora/detail/stored_rows.hpp
  include/lora/kernel/compiler.hpp
  include/lora/kernel/environment.hpp
  include/lora/kernel/isa/avx2.hpp
  include/lora/kernel/isa/avx512.hpp
  include/lora/kernel/isa/portable.hpp
  include/lora/kernel/isa/transpose_x86.hpp
  include/lora/kernel/lookahead.hpp
  include/lora/kernel/memory.hpp
  include/lora/kernel/merge/delta_tiles.hpp
  include/lora/kernel/merge/stacked_factors.hpp
  include/lora/kernel/merge/tile_change.hpp
  include/lora/kernel/merge/tile_sink.hpp
  include/lora/kernel/merge/tile_sinks.hpp
  include/lora/kernel/multiplier.hpp
  include/lora/kernel/overflow_watch.hpp
  include/lora/kernel/panels.hpp
  include/lora/kernel/product/adapter_product.hpp
  include/lora/kernel/product/base_product.hpp
  include/lora/kernel/product/call.hpp
  include/lora/kernel/product/mode_product.hpp
  include/lora/kernel/product/packed_factors.hpp
  include/lora/kernel/product/packed_tokens.hpp
  include/lora/kernel/product/token_plan.hpp
  include/lora/kernel/scratch.hpp
  include/lora/kernel/simd.hpp
  include/lora/kernel/threads.hpp
  include/lora/kernel/tile.hpp
  include/lora/kernel/tuning.hpp
  include/lora/kernel/widen.hpp
  include/lora/error.hpp
  include/lora/float16.hpp
  include/lora/forward.hpp
  include/lora/fwd.hpp
  include/lora/in_rows.hpp
  include/lora/kinds/adalora.hpp
  include/lora/kinds/full.hpp
  include/lora/kinds/ia3.hpp
  include/lora/kinds/oft.hpp
  include/lora/kinds/factored_matrix.hpp
  include/lora/kinds/loha.hpp
  include/lora/kinds/lokr.hpp
  include/lora/kinds/vera.hpp
  include/lora/machine.hpp
  include/lora/linear.hpp
  include/lora/lora.hpp
  include/lora/model.hpp
  include/lora/matrix_view.hpp
  include/lora/merge.hpp
  include/lora/module_adapter.hpp
  include/lora/moved_prefix.hpp
  include/lora/merge_report.hpp
  include/lora/mixed.hpp
  include/lora/packed_adapter.hpp
  include/lora/packed_weight.hpp
  include/lora/residual.hpp
  include/lora/prepared_merge.hpp
  include/lora/rounding.hpp
  include/lora/rounding_bounds.hpp
  include/lora/embed.hpp
  include/lora/embed_bounds.hpp
  include/lora/scaled.hpp
  include/lora/scaling.hpp
  include/lora/steps.hpp
  include/lora/tensor_view.hpp
  include/lora/through.hpp
  include/lora/version.hpp
  include/lora/workspace.hpp)

add_library(lora_io INTERFACE)
add_library(lora::io ALIAS lora_io)
set_target_properties(lora_io PROPERTIES EXPORT_NAME io)
target_link_libraries(lora_io INTERFACE lora_lora)
target_sources(lora_io INTERFACE FILE_SET HEADERS BASE_DIRS "${PROJECT_SOURCE_DIR}/include" FILES
  include/lora/io/detail/input_file.hpp
  include/lora/io/detail/json.hpp
  include/lora/io/detail/json_text.hpp
  include/lora/io/detail/json_tree.hpp
  include/lora/io/detail/module_path.hpp
  include/lora/io/detail/module_pattern.hpp
  include/lora/io/detail/name_tables.hpp
  include/lora/io/detail/number_text.hpp
  include/lora/io/detail/output_file.hpp
  include/lora/io/detail/pattern.hpp
  include/lora/io/detail/peft_assembler.hpp
  include/lora/io/detail/peft_directory.hpp
  include/lora/io/detail/peft_keys.hpp
  include/lora/io/detail/peft_metadata.hpp
  include/lora/io/detail/peft_modules.hpp
  include/lora/io/detail/peft_name_meanings.hpp
  include/lora/io/detail/peft_version.hpp
  include/lora/io/detail/posix.hpp
  include/lora/io/detail/safetensors_header.hpp
  include/lora/io/detail/tensor_rows.hpp
  include/lora/io/detail/text.hpp
  include/lora/io/detail/wrapper_names.hpp
  include/lora/io/dtype.hpp
  include/lora/io/format_error.hpp
  include/lora/io/peft.hpp
  include/lora/io/peft/adalora.hpp
  include/lora/io/peft/adapter_kinds.hpp
  include/lora/io/peft/common_keys.hpp
  include/lora/io/peft/config.hpp
  include/lora/io/peft/config_kind.hpp
  include/lora/io/peft/config_kinds.hpp
  include/lora/io/peft/config_object.hpp
  include/lora/io/peft/config_reader.hpp
  include/lora/io/peft/expert_layout_keys.hpp
  include/lora/io/peft/ia3.hpp
  include/lora/io/peft/kind_file.hpp
  include/lora/io/peft/kind_module.hpp
  include/lora/io/peft/loha.hpp
  include/lora/io/peft/lokr.hpp
  include/lora/io/peft/lora_keys.hpp
  include/lora/io/peft/lora_set.hpp
  include/lora/io/peft/oft.hpp
  include/lora/io/peft/open_kind.hpp
  include/lora/io/peft/read_options.hpp
  include/lora/io/peft/set_reader.hpp
  include/lora/io/peft/set_writer.hpp
  include/lora/io/peft/stored_format.hpp
  include/lora/io/peft/target_rule.hpp
  include/lora/io/peft/vera.hpp
  include/lora/io/peft_adapters.hpp
  include/lora/io/peft_config.hpp
  include/lora/io/peft_convert.hpp
  include/lora/io/peft_entry.hpp
  include/lora/io/peft_entry_parts.hpp
  include/lora/io/peft_file.hpp
  include/lora/io/peft_inventory.hpp
  include/lora/io/peft_patterns.hpp
  include/lora/io/peft_replacement.hpp
  include/lora/io/peft_stacks.hpp
  include/lora/io/peft_verbs.hpp
  include/lora/io/peft_write.hpp
  include/lora/io/peft_write_adapters.hpp
  include/lora/io/safetensors.hpp
  include/lora/io/safetensors_index.hpp
  include/lora/io/safetensors_write.hpp)
